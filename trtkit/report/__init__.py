"""Reports: records in, one comparison out, as console text, Markdown, HTML, CSV or JSON.

`assemble` puts numbers beside each other; renderers print them and compute nothing. Knows nothing of engines.
"""
