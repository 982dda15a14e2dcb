"""TREC runs -> metrics and comparisons."""
