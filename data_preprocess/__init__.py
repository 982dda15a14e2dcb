"""Raw data sets -> conversations, collection, qrels, parquet.

A module imports only modules after it: the commands (bright, demo, demo_model, download, mtrag, qrecc, stackexchange,
subset, topiocqa) > *_data, *_proxy, *_rows, *_answers, *_questions, mtrag_ibm, demo_gguf > writers, splits > sources >
options, releases.
"""
