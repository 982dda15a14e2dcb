"""Indexes, exact gold ranks and the HTTP server in front of them."""
