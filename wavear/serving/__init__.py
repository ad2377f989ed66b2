"""The page of `wavear serve`: resynthesis, and live audio over a WebSocket."""
