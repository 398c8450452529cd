"""What a run shows: terminal, JSON, page, Markdown, JUnit."""
