"""Reports of the benchmarks: JSON with all samples and the environment, Markdown with the medians."""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

from children import ROOT

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = "torch jax jaxlib flax optax transformers datasets tokenizers accelerate numpy pyarrow".split()
CPU_FLAGS = "avx2 avx512f avx512_bf16 avx512_fp16 avx512_vnni amx_tile amx_bf16 asimd sve bf16".split()


def first_line(command):
    """Return the first line that a command prints, or None where it fails."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def versions():
    """Return {package: version} of what is installed."""
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def hardware():
    """Return the processor, its instructions that matter here, the cores of this process, memory, and the GPU."""
    cpu = Path("/proc/cpuinfo").read_text()
    model = re.search(r"^model name\s*: (.*)$", cpu, re.M)
    number = re.search(r"^model\s*: (.*)$", cpu, re.M)
    flags = set((re.search(r"^(?:flags|Features)\s*: (.*)$", cpu, re.M) or ["", ""])[1].split())
    memory = int(re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())[1])
    return {
        "cpu": f"{model[1] if model else 'unknown'} (model {number[1] if number else '?'})",
        "cpu_flags": [name for name in CPU_FLAGS if name in flags],
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**20, 1),
        "gpu": first_line(["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]),
        "load_average_at_start": os.getloadavg()[0],
    }


def commit():
    """Return the git commit, marked when the scripts differ from it."""
    changed = first_line(["git", "status", "--porcelain", "--", "run_mlm.py", "run_mlm_flax.py"])
    return f"{first_line(['git', 'rev-parse', 'HEAD'])}{' + uncommitted changes' if changed else ''}"


def without_paths(text):
    """Return a text without the folders of this machine."""
    text = text.replace(f"{ROOT}/", "").replace(str(Path.home()), "~")
    return re.sub(rf"{re.escape(tempfile.gettempdir())}/\S*?([^/\s]*)(?=\s|$|['\"])", r"\1", text)


def command_line():
    """Return the command that was given, file names without their folders."""
    return " ".join(["python", f"tests/benchmarks/{os.path.basename(sys.argv[0])}", *map(file_name, sys.argv[1:])])


def file_name(value):
    """Return the last part of a value that is an absolute path."""
    return os.path.basename(value) if isinstance(value, str) and os.path.isabs(value) else value


class Report:
    """Samples of variants by round; saved after each, so that a run that is cut short leaves what it has."""

    def __init__(self, name, title, settings):
        self.name, self.title = name, title
        settings = {name: file_name(value) for name, value in settings.items()}
        self.head = {"benchmark": name, "command": command_line(), "commit": commit(), "settings": settings}
        self.head |= {"versions": versions(), "hardware": hardware()}
        self.samples, self.tables, self.notes = [], {}, []

    def add(self, result, **keys):
        """Keep a sample, {"error"} included, under its keys."""
        if "error" in result:
            result = {"error": without_paths(result["error"])}
        self.samples.append({**keys, **result})
        shown = {name: round(value, 4) if isinstance(value, float) else value for name, value in result.items()}
        print(f"{keys}: {shown}", file=sys.stderr, flush=True)
        self.save()

    def values(self, metric, **keys):
        """Return {round: value} of a metric among the samples with these keys."""
        return {
            sample.get("round", 0): sample[metric]
            for sample in self.samples
            if metric in sample and all(sample.get(name) == value for name, value in keys.items())
        }

    def error(self, **keys):
        """Return the first error among the samples with these keys, or None."""
        return next(
            (
                sample["error"]
                for sample in self.samples
                if "error" in sample and all(sample.get(name) == value for name, value in keys.items())
            ),
            None,
        )

    def save(self):
        """Write `results/NAME.json` and `results/NAME.md`."""
        RESULTS.mkdir(exist_ok=True)
        content = {**self.head, "tables": self.tables, "notes": self.notes, "samples": self.samples}
        (RESULTS / f"{self.name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        if self.tables:
            (RESULTS / f"{self.name}.md").write_text(self.markdown(), encoding="utf-8")

    def markdown(self):
        """Return the report as Markdown."""
        machine, software = self.head["hardware"], self.head["versions"]
        flags = ", ".join(machine["cpu_flags"])
        lines = [f"# {self.title}", "", f"    {self.head['command']}", ""]
        lines += [f"- Commit: {self.head['commit']}"]
        lines += [f"- Machine: {machine['cores']} cores of {machine['cpu']} ({flags}), {machine['memory_gib']} GiB"]
        lines += [f"- GPU: {machine['gpu']}"] if machine["gpu"] else []
        lines += ["- Versions: " + ", ".join(f"{name} {value}" for name, value in software.items() if value)]
        lines += [
            "- Medians of interleaved rounds, each in a process of its own (smallest to largest); ratios by round."
        ]
        for title, rows in self.tables.items():
            lines += ["", f"## {title}", "", *markdown_table(rows)]
        return "\n".join([*lines, "", *[f"- {note}" for note in self.notes]]).rstrip() + "\n"


def markdown_table(rows):
    """Return the lines of a table for dicts, the keys of all as columns."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns), *[[row.get(name, "") for name in columns] for row in rows]]
    return ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines]


def spread(values, scale=1.0, digits=2):
    """Return `median (smallest to largest)` of some numbers."""
    values = sorted(value * scale for value in values)
    if not values:
        return ""
    low, middle, high = (f"{value:,.{digits}f}" for value in (values[0], statistics.median(values), values[-1]))
    return middle if len(values) == 1 else f"{middle} ({low} to {high})"


def ratios(values, base):
    """Return the ratios of two {round: value}, round by round."""
    return [values[i] / base[i] for i in values if i in base]


def verdict(found, target, at_least=True):
    """Return the target and whether the median ratio meets it; "" where there is none."""
    if target is None or not found:
        return ""
    middle = statistics.median(found)
    met = middle >= target if at_least else middle <= target
    return f"{'≥' if at_least else '≤'} {target:g}: {'met' if met else 'missed'}"
