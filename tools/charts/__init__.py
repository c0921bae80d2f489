"""Curves as SVG: for the report page, and for files of their own."""
