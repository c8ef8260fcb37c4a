"""Make a text file and its word references from a text whose words are separated by spaces.

    python configs/chinese/make_word_references.py segmented.txt TOKENIZER text.txt references.txt

TOKENIZER is a folder or a hub name with a fast tokenizer. Lines stay lines, blank ones included. Words are joined
without a space, but for two that meet in ASCII letters or digits.
"""

import argparse
import json

import transformers


def join_words(words):
    """Return (text, the place of the first character of each word in it)."""
    text, starts = "", set()
    for word in words:
        latin = text and all(char.isascii() and char.isalnum() for char in (text[-1], word[0]))
        text += " " if latin else ""
        starts.add(len(text))
        text += word
    return text, starts


def word_references(tokenizer, text, starts):
    """Return the positions of the tokens, special ones counted, that do not begin a word."""
    encoding = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True, verbose=False)
    tokens = zip(encoding["offset_mapping"], encoding["special_tokens_mask"])
    return [i for i, ((first, _), special) in enumerate(tokens) if not special and first not in starts]


def write_references(args):
    """Read the segmented text and write the two files; raises `OSError` or `ValueError` for a file that is no good."""
    with open(args.segmented, encoding="utf-8-sig") as source:
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.tokenizer)
        with (
            open(args.text, "w", encoding="utf-8") as text_file,
            open(args.references, "w", encoding="utf-8") as reference_file,
        ):
            for line in source:
                text, starts = join_words(line.split())
                text_file.write(f"{text}\n")
                reference_file.write(f"{json.dumps(word_references(tokenizer, text, starts) if text else [])}\n")


def main():
    """Parse the command line and write the two files; a mistake is one line, with status 2."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("segmented", help="text whose words are separated by spaces")
    parser.add_argument("tokenizer", help="folder or hub name of a fast tokenizer")
    parser.add_argument("text", help="the text to write")
    parser.add_argument("references", help="the word references to write")
    args = parser.parse_args()
    try:
        write_references(args)
    except (OSError, ValueError) as error:
        cause = f"{error.filename}: {error.strerror}" if getattr(error, "strerror", None) else str(error)
        parser.exit(2, f"error: {' '.join(cause.split())}\n")


if __name__ == "__main__":
    main()
