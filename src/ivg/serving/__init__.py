"""The server: OpenAI's protocol over one search loop (extra ``serve``)."""
