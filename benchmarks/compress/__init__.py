"""How long compression takes and what memory it needs, on pairs as large as real ones."""
