"""The places that hold blocks, one file each. Imported as `kvstore.tiers`, never as `tiers`."""
