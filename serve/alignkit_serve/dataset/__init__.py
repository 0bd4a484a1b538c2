"""How feedback becomes data: pure rules, one idea a file, under a version of their own.

What a row is made of, and why a judgement is in none, can be told of every single one.
"""

RULE_VERSION = 1
"""Goes up with every change after which the same feedback makes other rows; an export keeps the one that it was made by."""
