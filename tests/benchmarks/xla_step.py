"""Print what XLA says of the training step of `run_mlm_flax.py` at BERT-base sizes: no step is run, no GPU is needed.

    python tests/benchmarks/xla_step.py [--script OTHER/run_mlm_flax.py] [--shape 8x512] [--dtype bfloat16]

For each batch shape and type: bytes accessed and temporary memory of the compiled step, from XLA's own analysis; and in
the program that XLA gets, before a backend changes it, each scatter with its type and shape, and the matrix products of
float32. `--script` compares another version, in an environment that it runs in.
"""

import argparse
import collections
import functools
import importlib.util
import math
import re
import sys

import jax
import jax.numpy as jnp
import transformers

OPERATION = re.compile(r'"?stablehlo\.(scatter|dot_general)"?.*?: \((.+?)\) -> (.+)')
TENSOR = re.compile(r"tensor<([\dx]*?)x?(f32|bf16|i32|ui32|i1)>")


def load(path):
    """Return the script at a path as a module."""
    spec = importlib.util.spec_from_file_location("run_mlm_flax", path)
    script = sys.modules["run_mlm_flax"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def make_model(script, dtype):
    """Return (model, function that makes its parameters): BERT-base, dropout as in its configuration."""
    config = transformers.BertConfig()
    if hasattr(script, "create_model"):
        args = script.TrainingArguments(bf16=dtype == jnp.bfloat16)
        model, ids = script.create_model(config, args), jnp.ones((1, 1), jnp.int32)
        return model, lambda: model.init(jax.random.key(0), ids, ids)["params"]
    model = script.FlaxAutoModelForMaskedLM.from_config(
        config, dtype=dtype, _do_init=False
    )  # Versions before 2026-11-28.
    return model, lambda: model.init_weights(jax.random.key(0), (1, 1))


def lower_step(script, rows, length, dtype):
    """Return the lowered training step of a batch of full rows, 15 % of its positions labelled."""
    model, init = make_model(script, dtype)
    optimizer = script.create_optimizer(script.TrainingArguments(), lambda step: 1e-4)
    slots = script.label_slots(jnp.full((rows, length), -100), 0.15)
    settings = {} if hasattr(script, "create_model") else {"sparse_start": "layer"}

    def state():
        apply_fn = functools.partial(script.masked_logits, model=model, **settings)
        return script.TrainState.create(apply_fn=apply_fn, params=init(), tx=optimizer, grad_norm=jnp.zeros(()))

    batch = {name: jnp.zeros((rows, length), jnp.int32) for name in ("input_ids", "attention_mask")}
    batch |= {name: jnp.zeros(slots, jnp.int32) for name in ("positions", "labels")}
    rng = jax.eval_shape(lambda: jax.random.split(jax.random.key(0, impl="rbg"), 1))
    on_device = functools.partial(jax.tree.map, lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype))
    step = jax.pmap(script.training_step, "batch", donate_argnums=(0, 2))
    return step.lower(on_device(jax.eval_shape(state)), on_device(jax.eval_shape(lambda: batch)), rng)


def operations(text):
    """Return (scatters, float32 products of matrices): a `Counter` of shapes each."""
    scatters, products = collections.Counter(), collections.Counter()
    for line in re.sub(r"\(\{.*?\}\)", "", text, flags=re.DOTALL).splitlines():
        if not (found := OPERATION.search(line)):
            continue
        inputs = [(shape, kind) for shape, kind in TENSOR.findall(found[2])]
        if found[1] == "scatter":
            scatters[f"{inputs[0][1]}[{inputs[0][0]}] += [{inputs[2][0]}]"] += 1
        elif {kind for _, kind in inputs} == {"f32"} and math.prod(map(int, inputs[0][0].split("x"))) > 10_000:
            products[" @ ".join(shape for shape, _ in inputs)] += 1
    return scatters, products


def show(counter):
    """Return the counts as text."""
    return "; ".join(f"{count} x {name}" for name, count in counter.items()) or "none"


def main():
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--script", default="run_mlm_flax.py", help="default: that of this folder")
    parser.add_argument("--shape", action="append", help="ROWSxLENGTH (default: 8x512 and 32x128)")
    parser.add_argument("--dtype", action="append", choices=["float32", "bfloat16"], help="default: both")
    arguments = parser.parse_args()
    script = load(arguments.script)
    print("| batch | type | GB accessed | temporary MiB | scatters | float32 products |\n|" + " --- |" * 6)
    for shape in arguments.shape or ("8x512", "32x128"):
        for dtype in arguments.dtype or ("float32", "bfloat16"):
            lowered = lower_step(script, *map(int, shape.split("x")), jnp.dtype(dtype).type)
            scatters, products = operations(lowered.as_text())
            products = show(products) if dtype == "bfloat16" else "all"
            compiled = lowered.compile()
            accessed = compiled.cost_analysis()["bytes accessed"] / 1e9
            temporary = compiled.memory_analysis().temp_size_in_bytes / 2**20
            print(
                f"| {shape} | {dtype} | {accessed:.1f} | {temporary:,.0f} | {show(scatters)} | {products} |", flush=True
            )


if __name__ == "__main__":
    main()
