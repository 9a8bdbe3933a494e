"""What the pages show runs: the starts, the commands, the examples, the links; and the README stays short."""

import ast
import functools
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pytest
import torch
from diffusers import DDPMScheduler

import sdekit
from sdekit import VPSDE, Noise, cli, training

ROOT = Path(__file__).resolve().parent.parent
PAGES = (
    "README.md", "benchmarks/README.md", "benchmarks/CHOOSING.md", "examples/README.md", "sdekit/evaluation/README.md"
)  # fmt: skip
TEXT = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
README = TEXT["README.md"]


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT[page], re.S | re.M)


def test_the_readme_is_short_and_has_both_commands():
    assert len(README.splitlines()) <= 200
    for marker, end in (("main job", "benchmarks/nfe_vs_fid.py"), ("ci:tests", "-m pytest -n 2")):
        command = re.search(rf"<!-- {marker} -->\n```bash\n(.*)\n```", README)
        assert command is not None, marker
        assert command[1].endswith(end)


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """The starts' work in a temporary folder, with few noises and few training steps."""
    few = functools.partial(sdekit.calibrate, noises=4, iterations=2, batch=4)
    train = training.train
    monkeypatch.setattr(sdekit, "calibrate", few)
    monkeypatch.setattr(sdekit, "compare", functools.partial(sdekit.compare, seconds=1.0, progress=False))
    monkeypatch.setattr(training, "train", lambda *args, **options: train(*args, **{**options, "steps": 2}))
    monkeypatch.chdir(tmp_path)


def test_the_starts_run(quick, capsys):
    """All code of the README and of CHOOSING.md, in order, with an eps-network that is exact for N(0, 0.25)."""
    calls, sde = [0], VPSDE()

    def network(x, t):
        calls[0] += 1
        alpha, sigma = (k(t).reshape(-1, 1, 1, 1) for k in (sde.alpha, sde.sigma))
        return sigma * x / (alpha**2 / 4 + sigma**2)

    def velocity(x, t):
        assert 0.9 < float(t.max()) <= 1000
        return SimpleNamespace(sample=0.1 * x)

    pipe = SimpleNamespace(unet=lambda x, timestep: 0.1 * x, scheduler=DDPMScheduler())
    names = {
        "network": network,
        "pipe": pipe,
        "text": torch.zeros(16, 1, 4),
        "velocity": velocity,
        "shape": (4, 3, 8, 8),
        "data": 0.5 * Noise(torch.empty(100, 3, 32, 32), 0).normal(),
    }
    starts = blocks("README.md", "python")
    assert len(starts) == 6
    for code in starts:
        exec(code, names)
    assert names["x"].std() == pytest.approx(1.04**0.5, abs=0.03)  # the last x is the new process's and rule's
    assert names["bits"].shape == (16,)
    assert (names["low"] <= names["high"]).all()
    assert names["between"].shape == (3, 8, 3, 32, 32)
    assert calls[0] > 0
    assert pipe.scheduler.config.sampler == "unipc_2"
    assert names["eps"](torch.ones(1, 3, 8, 8), 0.5).shape == (1, 3, 8, 8)
    assert Path("six.json").is_file()
    assert training.load_checkpoint("digits.safetensors")[1].event == (1, 8, 8)
    (compare,) = blocks("benchmarks/CHOOSING.md", "python")
    exec("from sdekit import ode_sample, sample\n" + compare, names)
    errors = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()[-4:]]
    assert all(error < 0.1 for error in errors[:3])
    assert errors[3] < 0.3


def test_the_first_start_draws_its_law():
    """Each of its lines, for numbers of N(0, 0.25) instead of images; ten evaluations err by a tenth there."""
    sde = VPSDE()

    def network(x, t):
        return x * (sde.sigma(t) / (sde.alpha(t) ** 2 / 4 + sde.sigma(t) ** 2))[:, None]

    names = {**vars(sdekit), "sde": sde, "score": sdekit.as_score(network, sde, predicts="eps")}
    lines = re.findall(r"^x = (.*\))  #", blocks("README.md", "python")[0], re.M)
    assert len(lines) == 4
    for line in lines:
        x = names["x"] = eval(line.replace("(16, 3, 32, 32)", "(3000, 1)"), names)
        assert x.std() == pytest.approx(0.5, abs=0.06), line


def test_command_lines_are_understood(monkeypatch):
    ran = []
    for name, (_, flags, text) in list(cli.COMMANDS.items()):
        monkeypatch.setitem(cli.COMMANDS, name, (lambda options: ran.append(options.command), flags, text))
    for page in PAGES:
        lines = [line for block in blocks(page, "bash") for line in block.splitlines() if line.startswith("sdekit ")]
        for line in lines:
            cli.main(shlex.split(line, comments=True)[1:])
        for script in re.findall(r"python (\w+/\w+\.py)", TEXT[page]):
            assert (ROOT / script).is_file(), script
    assert set(cli.COMMANDS) == set(ran)


def anchors(text):
    """What GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.*)", text, re.M)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_what_is_linked_is_there():
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)]+)\)", TEXT[page]):
            path, _, anchor = target.partition("#")
            assert (ROOT / page).parent.joinpath(path).exists(), f"{page}: {target}"
            there = (ROOT / page).parent.joinpath(path).read_text(encoding="utf-8") if path and anchor else TEXT[page]
            assert not anchor or anchor in anchors(there), f"{page}: {target}"


def test_every_room_has_its_line():
    rooms = [p.parent.name for p in sorted((ROOT / "sdekit").glob("*/__init__.py"))]
    assert rooms
    for room in [f"sdekit/{name}" for name in rooms] + ["sdekit/pretrained.py"]:
        assert re.search(rf"^\| \[[\w.]+\]\({room}\) \|", README, re.M), f"{room} is missing in 'What is where'"


def test_every_example_is_in_the_gallery():
    for example in (ROOT / "examples").glob("*.py"):
        assert f"]({example.name})" in TEXT["examples/README.md"], example.name


def definition(path, name):
    """The source of a function or class, decorators included."""
    source = (ROOT / path).read_text(encoding="utf-8")
    node = next(n for n in ast.parse(source).body if getattr(n, "name", None) == name)
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    return "\n".join(source.splitlines()[first - 1 : node.end_lineno])


def test_small_things_are_small():
    """A process in two one-line methods, Euler-Maruyama in at most ten lines."""
    node = ast.parse(definition("sdekit/solvers/steppers/drift.py", "euler_maruyama")).body[0]
    assert node.end_lineno - node.lineno + 1 <= 10
    process = ast.parse(definition("examples/extend.py", "Cosine")).body[0]
    methods = [n for n in process.body if isinstance(n, ast.FunctionDef)]
    assert [m.name for m in methods] == ["alpha", "sigma"]
    assert all(len(m.body) == 1 for m in methods)


# What each example prints of a quantity with a known value, and how near it must be.
PRINTS = {
    "guidance.py": [(r"scale 0: ([\d.]+)", 0.1, 0.06), (r"scale 1: ([\d.]+)", 0.95, 0.05),
                    (r"scale 4: ([\d.]+)", 1.0, 0.01), (r"classifier, scale 1: ([\d.]+)", 0.76, 0.08),
                    (r"classifier, scale 4: ([\d.]+)", 0.99, 0.02)],
    "inpainting.py": [(r"posterior_sample: misfit ([\d.]+)", 1.0, 0.15),
                      (r"effective particles ([\d.]+)", 3.2, 0.5)],
    "interpolate.py": [(r"moons: round-trip error ([\d.e-]+)", 0.0, 1e-3),
                       (r"digits: round-trip error ([\d.e-]+)", 0.0, 0.02)],
    "correlated_noise.py": [(r"own spectrum: samples' spectrum off by ([\d.]+) %", 1.3, 1.0),
                            (r"own spectrum: .* log p by ([\d.]+) nats", 0.0, 2e-3)],
    "quickstart.py": [(r"data: (-?[\d.]+) nats", -1.02, 0.1)],
    "diffusers_model.py": [(r"sdekit, 6 evaluations: ([\d.]+)", 0.08, 0.01),
                           (r"DDIM, 6 evaluations: ([\d.]+)", 0.144, 0.01)],
    "diffusers_pipeline.py": [(r"differ by ([\d.e+-]+)", 0.0, 1e-4)],
    "nice.py": [(r"moons, NICE: (-[\d.]+)", -1.61, 0.1),
                (r"its Jacobian by ([\d.e-]+)", 0.0, 1e-5),
                (r"moons, continuous flow: (-[\d.]+)", -2.16, 0.3),
                (r"moons, diffusion's flow: (-[\d.]+)", -1.64, 0.1),
                (r"digits, NICE: ([\d.]+) bits a pixel on others", 2.95, 0.15),
                (r"digits, diffusion's flow: ([\d.]+)", 1.86, 0.1)],
    "ddpm.py": [(r"alpha = ([\d.]+)", 0.0064, 1e-4), (r"([\d.]+) in the last", 0.092, 0.02),
                (r"ancestral, 250 steps: Fréchet distance ([\d.]+)", 1.4, 0.5),
                (r"DDIM, 10 steps: Fréchet distance ([\d.]+)", 4.6, 1.5), (r"= ([\d.]+) bits a pixel", 3.7, 0.4)],
    "score_matching.py": [(r"explicit: score off by ([\d.]+)", 0.06, 0.03),
                          (r"denoising: score off by ([\d.]+)", 0.15, 0.05),
                          (r"implicit: score off by ([\d.]+)", 0.2, 0.06),
                          (r"sliced: score off by ([\d.]+)", 0.22, 0.06),
                          (r"differences: score off by ([\d.]+)", 0.23, 0.06)],
    "sde_family.py": [*((rf"churn {c}: marginals off by ([\d.]+)", 0.0, 0.0185) for c in ("0", "0.5", "1", "1.5")),
                      (r"within ([\d.e-]+)", 0.0, 1e-6)],  # 2.6/N^.5: a false alarm in 1e-5, of one seed that passes
    "latent_diffusion.py": [(r"the diffusion gains ([\d.]+) nats", 0.3, 0.2), (r"one is ([\d.]+) above", 1.2, 0.6),
                            (r"guidance 0: ([\d.]+)", 0.1, 0.08), (r"guidance 1: ([\d.]+)", 0.96, 0.04),
                            (r"guidance 2: ([\d.]+)", 1.0, 0.02)],
    "poisson_flow.py": [(r"D = 1: ([\d.]+)", 0.983, 0.006), (r"D = 128: ([\d.]+)", 1.0, 1e-3),
                        (r"flow is within ([\d.e-]+)", 0.0, 1e-5)],
    "science.py": [(r"50% interval in ([\d.]+)", 0.5, 0.125), (r"90% interval in ([\d.]+)", 0.9, 0.075),
                   (r"mean is off by ([\d.]+)", 0.2, 0.3), (r"spreads by a factor of ([\d.]+)", 1.1, 0.2)],
    "sets.py": [(r"differs by ([\d.e-]+)", 0.0, 1e-5),
                (r"3 corners: .* (-?[\d.]+) below", 0.3, 0.25), (r"4 corners: .* (-?[\d.]+) below", 0.0, 0.25),
                (r"5 corners: .* (-?[\d.]+) below", 0.7, 0.3)],
    "extend.py": [(r"rule: std ([\d.]+)", 1.020, 0.03), (r"weight 0.0: mean ([\d.]+)", 1.0, 0.02),
                  (r"weight 0.0: mean [\d.]+, std ([\d.]+)", 0.2, 0.02)],
}  # fmt: skip


@pytest.mark.parametrize("example", sorted(p.name for p in (ROOT / "examples").glob("*.py")))
def test_examples_run(example, monkeypatch, capsys, tmp_path):
    """In this process, where torch and diffusers are imported once for all."""
    monkeypatch.chdir(tmp_path)
    plt.switch_backend("Agg")
    with torch.random.fork_rng(devices=[]):  # some train networks of their own, from the global generator
        runpy.run_path(str(ROOT / "examples" / example), run_name="__main__")
    plt.close("all")
    out = capsys.readouterr().out
    for pattern, value, slack in PRINTS[example]:
        assert float(re.search(pattern, out)[1]) == pytest.approx(value, abs=slack), out


def test_every_example_imports_what_it_uses():
    """By itself: what other tests have imported is not there for whoever runs an example."""
    imports = []
    for path in sorted((ROOT / "examples").glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                imports.append(ast.unparse(node))
        modules = [a.name for n in tree.body if isinstance(n, ast.Import) for a in n.names]
        assert not [m for m in modules if "sdekit" in m], path  # or it might use a room that another has opened
    env = {**os.environ, "MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT)}
    code = "\n".join(dict.fromkeys(imports))
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_no_file_is_long_and_nothing_asks_for_a_class():
    for file in (ROOT / "sdekit").rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 300, file
        assert not re.search(r"isinstance\([^)]*(SDE|HeatODE)", text), file
        assert not re.search(r"torch\.(manual_seed|rand|randn|randint)\((?![^\n]*generator)", text), file
