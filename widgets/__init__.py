"""Widgets of trtlab, imported as trtlab.widgets; nothing in trtlab imports them."""
