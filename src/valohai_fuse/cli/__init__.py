"""Click commands and rich output: words in, words out. The only room that prints."""
