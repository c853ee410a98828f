"""A network, its tokenizer, its template, its cache."""
