"""The store's verbs over a daemon: what `kvstore.connect` gives."""
