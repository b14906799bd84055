"""A server that draws: jobs over HTTP, a page for people, and the encoder of another machine (extra `serve`)."""
