"""The stock recipe on PyTorch, anew: `Trainer` with its own collator, the dense head, default arguments."""

import os

import stock
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
    set_seed,
)


def build_trainer(spec, max_steps=-1):
    """Return the `Trainer` with default arguments and what the flags of a spec change."""
    flags = [flag.removeprefix("--") for flag in spec.get("flags", ())]
    more = {"torch_compile": "torch_compile" in flags}
    if "dataloader_num_workers" in flags:
        more["dataloader_num_workers"] = int(flags[flags.index("dataloader_num_workers") + 1])
    if "torch_compile_backend" in flags:
        more["torch_compile_backend"] = flags[flags.index("torch_compile_backend") + 1]
    args = TrainingArguments(
        output_dir=os.path.join(spec["child_folder"], "out"),
        per_device_train_batch_size=spec["batch"],
        per_device_eval_batch_size=spec["batch"],
        max_steps=max_steps,
        bf16=spec["bf16"],
        use_cpu=spec["device"] == "cpu",
        **more,
    )
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    model = AutoModelForMaskedLM.from_pretrained(spec["model"])
    data = stock.load_data(spec, tokenizer)
    return Trainer(
        model=model,
        args=args,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15),
        compute_metrics=accuracy_of_predictions,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
    )


def accuracy_of_predictions(prediction):
    """Return the share of hits among the masked tokens."""
    labelled = prediction.label_ids.reshape(-1) != -100
    hits = (prediction.predictions.reshape(-1) == prediction.label_ids.reshape(-1))[labelled]
    return {"accuracy": float(hits.mean())}
