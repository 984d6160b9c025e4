"""Connectors to other engines, one file each; none ships yet. Imported as `kvstore.connectors`."""
