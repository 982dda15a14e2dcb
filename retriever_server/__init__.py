"""Indexes, exact gold ranks and the HTTP server in front of them."""

VERSION = "0.1.0"  # of the wire, as /health tells it
