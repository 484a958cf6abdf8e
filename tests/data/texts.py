"""Texts that are awkward for tokenizers."""

TEXTS = [
    "def f(x):\n    return x  # plain\n\n\n",
    "caf\u00e9 na\u00efve \u00fcber stra\u00dfe, "
    "\u4f60\u597d\u4e16\u754c \U0001f600\U0001f469\u200d\U0001f680 e\u0301",
    "<|endoftext|> and <|fim_hole|> are text here, as is <\uff5cend\u2581of\u2581sentence\uff5c>",
    "\t tabs \r\n carriage returns \x00 nul  trailing spaces   ",
    "a",
    "the cat sat on the mat, the cat sat on the hat, the rat sat on the cat " * 5,
]
