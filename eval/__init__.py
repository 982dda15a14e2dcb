"""TREC runs -> metrics and comparisons.

A module imports only modules of the lines below its own:
    commands: ance, bm25, bright, compare, conversations, metrics, readme, report, summary
    pages and tables: report_page > report_sections > report_charts, report_data; bright_search > bright_table,
        query_weighted, bright_data; compare_output, readme_table; comparison, breakdowns, search, systems
    figures and text: measures, significance, queries, report_html, tables
    files: runs > columns
"""

DEFAULT_MEASURES = "MRR NDCG@3 R@5 R@10 R@20 R@100"  # of eval.metrics, eval.bm25 and eval.ance
