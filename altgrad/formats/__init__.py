"""Number formats as rows of facts: scalar and block formats, the catalog, and what they look like. No torch."""
