"""Write the quickstart data: train.txt, validation.txt and the folder model/ (tokenizer, config).

    python configs/quickstart/make_corpus.py

The facts and the sentence frames are in world.txt. The same world.txt and the same library
versions always give the same bytes.
"""

import argparse
import random
import re
from collections import Counter
from pathlib import Path

from transformers import BertConfig, BertTokenizerFast

HERE = Path(__file__).resolve().parent
SEED = 20
TRAIN_LINES = 15_000
VALIDATION_LINES = 800
MAX_LENGTH = 128
OPENING_SHARE = 0.35
MIN_WORD_COUNT = 3
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
COMMON_ENDINGS = ["##es", "##ed", "##ing", "##er", "##est", "##ly", "##ness", "##ful"]
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
PUNCTUATION = "!\"'(),-.:;?"
NUMBERS = [
    "zero", "one", "two", "three", "four", "five", "six",
    "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen",
    "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
]  # fmt: skip


def split_cells(line):
    """Split a line of a table at its bars."""
    return [cell.strip() for cell in line.split("|")]


def read_world(path):
    """Return the word lists and the topics (rows of facts and frames) of world.txt."""
    sections = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("== "):
            section = sections.setdefault(line[3:], [])
        elif line and not line.startswith("#"):
            section.append(line)

    words = {cells[0]: cells[1:] for cells in map(split_cells, sections.pop("words"))}
    topics = {}
    for title, lines in sections.items():
        end_of_rows = lines.index("--")
        fields = split_cells(lines[0])
        rows = [dict(zip(fields, split_cells(line), strict=True)) for line in lines[1:end_of_rows]]
        topics[title] = {"rows": rows, "frames": lines[end_of_rows + 1 :]}

    topics["sums"]["rows"] = make_sums()
    # A person knows the tool, the shop and the product of their trade.
    trades = {row["trade"]: row for row in topics["trades"]["rows"]}
    for person in topics["people"]["rows"]:
        person.update(trades[person["trade"]])
    return words, topics


def make_sums():
    """Return the facts of addition up to ten plus ten, in words."""
    return [
        {
            "a": NUMBERS[a],
            "b": NUMBERS[b],
            "sum": NUMBERS[a + b],
            "a_next": NUMBERS[a + 1],
            "b_next": NUMBERS[b + 1],
        }
        for a in range(2, 11)
        for b in range(2, 11)
    ]


def fill_frame(frame, topic, children, words, rng):
    """Return one sentence: the frame with the facts of one row, and random names and times."""
    row, other_row = rng.sample(topic["rows"], 2)
    slots = {name: rng.choice(choices) for name, choices in words.items()}
    slots.update(rng.choice(children))
    slots.update(row)
    slots.update({f"other_{field}": value for field, value in other_row.items()})
    slots["friend"] = rng.choice([c["name"] for c in children if c["name"] != slots["name"]])
    if frame.startswith("+ "):
        frame = frame[2:]
        if rng.random() < OPENING_SHARE:
            frame = slots["opening"] + " " + frame
    return tidy(frame.format(**slots))


def tidy(sentence):
    """Put "an" before vowels and a capital at the start of each sentence."""
    sentence = re.sub(r"\b([Aa]) (?=[aeiouAEIOU])", r"\1n ", sentence)
    return re.sub(r'(^"?|[.?!] "?)([a-z])', lambda m: m[1] + m[2].upper(), sentence)


def make_lines(words, topics, count, rng):
    """Return that many different sentences in random order."""
    children = topics["children"]["rows"]
    frames = [(frame, topic) for topic in topics.values() for frame in topic["frames"]]
    # A dictionary keeps the order of insertion; a set would depend on the hash seed.
    sentences = {}
    while len(sentences) < count:
        frame, topic = rng.choice(frames)
        sentences[fill_frame(frame, topic, children, words, rng)] = True
    lines = list(sentences)
    rng.shuffle(lines)
    return lines


def make_vocabulary(lines):
    """Return the WordPieces: special tokens, characters, common endings, then words by count.

    The words are counted here because the order that a trainer gives to equally frequent pieces
    may change between versions of the tokenizers library.
    """
    counts = Counter(word for line in lines for word in re.findall(r"[a-z]+", line.lower()))
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    pieces = SPECIAL_TOKENS + list(PUNCTUATION) + list(CHARACTERS)
    pieces += [f"##{character}" for character in CHARACTERS] + COMMON_ENDINGS
    pieces += [word for word in ranked if counts[word] >= MIN_WORD_COUNT and len(word) > 1]
    return pieces


def write_lines(path, lines):
    """Write one line per string, with the same line ends on every system."""
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8", newline="\n")


def write_model_folder(folder, vocabulary):
    """Write the tokenizer (fast and slow form) and the configuration of a small BERT."""
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(folder / "vocab.txt", vocabulary)
    options = {"do_lower_case": True, "model_max_length": MAX_LENGTH}
    tokenizer = BertTokenizerFast(vocab=str(folder / "vocab.txt"), **options)
    tokenizer.save_pretrained(folder)
    BertConfig(
        architectures=["BertForMaskedLM"],
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=MAX_LENGTH,
        # With the usual 0.02 so narrow a model takes longer to leave the first plateau.
        initializer_range=0.06,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    ).save_pretrained(folder)


def main():
    """Write everything into the output folder."""
    parser = argparse.ArgumentParser(description="Write the quickstart data.")
    parser.add_argument("--output_dir", type=Path, default=HERE)
    output_dir = parser.parse_args().output_dir
    output_dir.mkdir(parents=True, exist_ok=True)

    words, topics = read_world(HERE / "world.txt")
    rng = random.Random(SEED)
    lines = make_lines(words, topics, TRAIN_LINES + VALIDATION_LINES, rng)
    validation, train = lines[:VALIDATION_LINES], lines[VALIDATION_LINES:]
    write_lines(output_dir / "train.txt", train)
    write_lines(output_dir / "validation.txt", validation)
    write_model_folder(output_dir / "model", make_vocabulary(train))


if __name__ == "__main__":
    main()
