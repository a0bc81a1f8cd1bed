"""Results as JSON, CSV, plots and a page: aggregate, epochs, words, tables, plots, gallery, page, output, markdown."""
