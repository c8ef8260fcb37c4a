"""Print what XLA says of the training step of `run_mlm_flax.py` at BERT-base sizes; no GPU is needed.

    python tests/benchmarks/xla_step.py [--script OTHER/run_mlm_flax.py] [--shape 8x512] [--dtype bfloat16]

For each batch shape and type: bytes accessed and temporary memory of the compiled step, from XLA's own analysis; and in
the program that XLA gets, before a backend changes it, each scatter with its type and shape, and the matrix products of
float32. `--script` compares another version, in an environment that it runs in. A CPU starts what it can at once, and
so computes early and stores what is computed again for the gradient; the order that needs the least memory, which is
closer to that of a GPU, is analysed with XLA_FLAGS=--xla_cpu_enable_concurrency_optimized_scheduler=false.

    python tests/benchmarks/xla_step.py --time 20 --small --shape 16x128 --dtype float32

Instead of the analysis: the median and the smallest time of a step. No step is run without `--time`.
"""

import argparse
import collections
import functools
import importlib.util
import math
import re
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import transformers

OPERATION = re.compile(r'"?stablehlo\.(scatter|dot_general)"?.*?: \((.+?)\) -> (.+)')
SMALL = {"num_hidden_layers": 6, "hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536}
TENSOR = re.compile(r"tensor<([\dx]*?)x?(f32|bf16|i32|ui32|i1)>")


def load(path):
    """Return the script at a path as a module."""
    spec = importlib.util.spec_from_file_location("run_mlm_flax", path)
    script = sys.modules["run_mlm_flax"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def make_model(script, dtype, **sizes):
    """Return (model, function that makes its parameters): BERT-base or of other sizes, dropout as in `BertConfig`."""
    config = transformers.BertConfig(**sizes)
    if hasattr(script, "create_model"):
        args = script.TrainingArguments(bf16=dtype == jnp.bfloat16)
        model, ids = script.create_model(config, args), jnp.ones((1, 1), jnp.int32)
        return model, lambda: model.init(jax.random.key(0), ids, ids)["params"]
    model = script.FlaxAutoModelForMaskedLM.from_config(
        config, dtype=dtype, _do_init=False
    )  # Versions before 2026-11-28.
    return model, lambda: model.init_weights(jax.random.key(0), (1, 1))


def make_step(script, rows, length, dtype, **sizes):
    """Return (step, function that makes its arguments): a batch of full rows, 15 % of its positions labelled."""
    model, init = make_model(script, dtype, **sizes)
    optimizer = script.create_optimizer(script.TrainingArguments(), lambda step: 1e-4)
    slots = script.label_slots(jnp.full((rows, length), -100), 0.15)
    settings = {} if hasattr(script, "create_model") else {"sparse_start": "layer"}
    apply_fn = functools.partial(script.masked_logits, model=model, **settings)

    def inputs():
        state = script.TrainState.create(apply_fn=apply_fn, params=init(), tx=optimizer, grad_norm=jnp.zeros(()))
        batch = {"input_ids": jax.random.randint(jax.random.key(1), (rows, length), 0, 30522)}
        batch |= {"attention_mask": jnp.ones((rows, length), jnp.int32), "labels": jnp.ones(slots, jnp.int32)}
        batch["positions"] = jnp.arange(slots, dtype=jnp.int32)
        state, batch = jax.tree.map(lambda array: jnp.expand_dims(array, 0), (state, batch))
        return state, batch, jax.random.split(jax.random.key(0, impl="rbg"), 1)

    return jax.pmap(script.training_step, "batch", donate_argnums=(0, 2)), inputs


def lower_step(script, rows, length, dtype):
    """Return the lowered training step at BERT-base sizes."""
    step, inputs = make_step(script, rows, length, dtype)
    return step.lower(*jax.eval_shape(inputs))


def time_step(step, inputs, rounds):
    """Return the milliseconds of each of `rounds` steps, after two that are not counted."""
    (state, batch, rng), times = jax.jit(inputs)(), []
    for _ in range(rounds + 2):
        start = time.perf_counter()
        _, state, rng = jax.block_until_ready(step(state, batch, rng))
        times.append(1000 * (time.perf_counter() - start))
    return times[2:]


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
    parser.add_argument("--time", type=int, metavar="ROUNDS", help="run so many steps, and print how long they take")
    parser.add_argument("--small", action="store_true", help="time a model of 6 layers and hidden size 384")
    arguments = parser.parse_args()
    script = load(arguments.script)
    sizes = SMALL if arguments.small else {}
    if not arguments.time:
        print("| batch | type | GB accessed | temporary MiB | scatters | float32 products |\n|" + " --- |" * 6)
    for shape in arguments.shape or ("8x512", "32x128"):
        for dtype in arguments.dtype or ("float32", "bfloat16"):
            inputs = script, *map(int, shape.split("x")), jnp.dtype(dtype).type
            if arguments.time:
                times = time_step(*make_step(*inputs, **sizes), arguments.time)
                print(f"{shape} {dtype}: median {statistics.median(times):.0f} ms, smallest {min(times):.0f} ms")
                continue
            lowered = lower_step(*inputs)
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
