"""Results as JSON, CSV, plots and a page: table, output, page, rows, charts, gallery, words, markdown, html."""
