"""Why something is wrong: weights traced to where they came from, operations replayed under every hypothesis."""
