"""What the benchmarks run on, made here: text that looks like language, a WordPiece tokenizer, random BERT models."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np

VOCABULARY = 30_522  # As bert-base-uncased.
WORDS = 60_000  # Twice what the vocabulary holds: the rare ones are cut into pieces, as in real text.
SHAPES = {
    "tiny": {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64},
    "small": {"num_hidden_layers": 6, "hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536},
    "base": {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
}


def word_list():
    """Return `WORDS` different words of one to five syllables, the short ones first: they become the frequent ones."""
    syllables = ["".join(pair) for pair in itertools.product("bcdfghklmnprstvw", "aeiou")]
    order = np.random.default_rng(0).permutation(len(syllables) ** 3)
    longer = [[syllables[i // base % len(syllables)] for base in (1, 80, 6400)] for i in order[:WORDS].tolist()]
    words = [*syllables, *("".join(parts[: 2 + i // 3000]) for i, parts in enumerate(longer))]
    return list(dict.fromkeys(words))[:WORDS], syllables


def write_text(path, megabytes, seed=0):
    """Write deterministic text: paragraphs of Zipf-distributed words, headings and blank lines, as in WikiText."""
    words = np.array(word_list()[0])
    probabilities = 1 / np.arange(10, len(words) + 10)
    probabilities /= probabilities.sum()
    rng = np.random.default_rng(seed)
    left = int(megabytes * 1e6)
    with open(path, "w", encoding="utf-8") as file:
        while left > 0:
            drawn = iter(rng.choice(words, 100_000, p=probabilities).tolist())
            for length in np.clip(rng.lognormal(4, 1, 700), 3, 600).astype(int).tolist():
                paragraph = list(itertools.islice(drawn, length))
                for i in range(9, length - 2, 11):
                    paragraph[i] += " ." if i % 3 else " ,"
                line = f" = {' '.join(paragraph)} = \n\n" if length < 8 else f" {' '.join(paragraph)} . \n\n"
                left -= file.write(line)
                if left <= 0:
                    break
    return str(path)


def write_tokenizer(folder):
    """Write a BERT tokenizer folder with `VOCABULARY` tokens for the words of `write_text`."""
    words, syllables = word_list()
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    digits = [str(digit) for digit in range(10)]
    marks = list("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")
    pieces = [f"##{piece}" for piece in [*syllables, *letters, *digits]]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokens = list(dict.fromkeys([*special, *marks, *digits, *letters, *pieces, *words]))[:VOCABULARY]
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    from transformers import BertTokenizerFast

    BertTokenizerFast(str(Path(folder) / "vocab.txt"), model_max_length=512).save_pretrained(folder)


def write_model(folder, shape, tokenizer=None):
    """Write a BERT folder with random weights and, beside it, `FOLDER-still`: the same without dropout.

    `tokenizer` is the folder of a real one. Runs in a child: it needs PyTorch.
    """
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

    if tokenizer:
        loaded = AutoTokenizer.from_pretrained(tokenizer)
        loaded.model_max_length = 512
        loaded.save_pretrained(folder)
    else:
        write_tokenizer(folder)
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(vocab_size=len(AutoTokenizer.from_pretrained(folder)), **SHAPES[shape])).save_pretrained(
        folder
    )
    still = Path(f"{folder}-still")
    shutil.copytree(folder, still)
    config = json.loads((still / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (still / "config.json").write_text(json.dumps(config))


def write_batches(path, count, batch, length, seed=0):
    """Write masked batches of random tokens, the same for all: `input_ids`, `labels`: int32 [count, B, L]."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1000, VOCABULARY - 1000, (count, batch, length), dtype=np.int32)
    chosen = rng.random(tokens.shape) < 0.15
    np.savez(path, input_ids=np.where(chosen, 4, tokens), labels=np.where(chosen, tokens, -100).astype(np.int32))
    return str(path)


def read_batches(path):
    """Yield the batches of `write_batches`, again and again, as {"input_ids", "attention_mask", "labels"}: [B, L]."""
    with np.load(path) as arrays:
        pairs = list(zip(arrays["input_ids"], arrays["labels"]))
    for input_ids, labels in itertools.cycle(pairs):
        yield {"input_ids": input_ids, "attention_mask": np.ones_like(input_ids), "labels": labels.copy()}
