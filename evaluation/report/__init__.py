"""The report: tables, figures and the sentences between them."""
