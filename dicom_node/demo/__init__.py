"""The demonstration: a scanner, a PACS and a picture around the real node."""
