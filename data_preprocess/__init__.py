"""Raw data sets -> conversations, parquet, collections and qrels."""
