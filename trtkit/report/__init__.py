"""Render records as Markdown, HTML, CSV and JSON. No arithmetic on results happens here."""
