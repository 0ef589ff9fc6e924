"""The nouns of trtkit. Standard library only; every other package imports these, these import none."""
