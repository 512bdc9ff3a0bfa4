"""The authors' implementation of ROME and causal tracing (Meng et al. 2022), run from a checkout.

The code is not included in this repository. The modules are loaded from the checkout and changed in memory to
run on the given device. The functions `execute_rome`, `calculate_hidden_flow` and `trace_with_repatch` are
called with the contexts, second moment and noise of the service, so that both implementations solve the same
problem.

The index arithmetic of the reference assumes that a tokenizer adds no BOS token; `without_bos` returns such a
model.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers.activations import ACT2FN, GELUTanh

from bench.harness import Report
from service.covariance.second_moment import KeyStatistics
from service.methods.parameters import RomeParameters
from service.models.loading import LoadedModel
from service.weights.factors import LowRank

REFERENCE_OPTION = "--reference"
INSTALL_HINT = (
    f"git clone https://github.com/kmeng01/rome and pass {REFERENCE_OPTION} PATH; "
    "without it only our own code is measured."
)
REFERENCE_PACKAGES = ("rome", "util", "experiments")  # packages of the checkout that are loaded
#: modules that the reference imports and that the functions called here do not use
STUB_MODULES: Mapping[str, Mapping[str, Any]] = {
    "datasets": {"load_dataset": None},
    "dsets": {"KnownsDataset": None},
    "util.globals": {"STATS_DIR": "", "DATA_DIR": ""},  # the reference reads a file in the working directory
}
LOSS_PATTERN = re.compile(r"^loss (\S+) =", re.MULTILINE)  # the loss is only printed


class ReferenceMissing(Exception):
    """There is no checkout of the reference implementation."""


def add_reference_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        REFERENCE_OPTION, type=Path, metavar="PATH", help="a checkout of github.com/kmeng01/rome"
    )


def load_reference(path: Path | None, report: Report) -> Reference | None:
    """Return the reference, or None after adding a note to the report on how to get it."""
    try:
        return Reference.load(path, report.device)
    except ReferenceMissing as error:
        report.add_note(str(error))
        return None


def without_bos(model: LoadedModel) -> LoadedModel:
    """Return the model with a tokenizer that adds no BOS token and has a pad token."""
    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.backend_tokenizer.post_processor = None
    tokenizer.pad_token = tokenizer.eos_token
    return replace(model, tokenizer=tokenizer)


def as_reference_model(model: LoadedModel) -> Any:
    """Return the transformers model on the same weights with its original activation functions."""
    reference_model = copy.deepcopy(model.model, {id(p): p for p in model.model.parameters()})
    for module in list(reference_model.modules()):
        for name, child in module.named_children():
            if isinstance(child, GELUTanh):
                setattr(module, name, ACT2FN[reference_model.config.activation_function])
    return reference_model


def retarget_device(source: str, device: str) -> str:
    """Return source code with "cuda" replaced by `device`."""
    return source.replace('"cuda"', f'"{device}"').replace(".cuda()", f'.to("{device}")')


class _Loader(SourceFileLoader):
    """Compiles a file after `retarget_device`, without byte code."""

    def __init__(self, name: str, path: str, device: str) -> None:
        super().__init__(name, path)
        self.device = device

    def get_code(self, fullname: str) -> CodeType:
        source = retarget_device(Path(self.path).read_text(encoding="utf-8"), self.device)
        with warnings.catch_warnings(action="ignore"):  # invalid escape sequences
            return compile(source, self.path, "exec", dont_inherit=True)


class _Finder(MetaPathFinder):
    def __init__(self, root: Path, device: str) -> None:
        self.root, self.device = root, device

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not _is_reference_module(fullname):
            return None
        spec = PathFinder.find_spec(fullname, path or [str(self.root)], target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(fullname, spec.loader.path, self.device)
        return spec


def _is_reference_module(name: str) -> bool:
    return name.partition(".")[0] in (*REFERENCE_PACKAGES, *STUB_MODULES)


@contextlib.contextmanager
def _reference_importable(root: Path, device: str) -> Iterator[None]:
    """Make the modules of the reference importable within the context, and remove them from `sys.modules`
    afterwards."""
    finder = _Finder(root, device)
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if _is_reference_module(name)}
    for name, contents in STUB_MODULES.items():
        stub = ModuleType(name)
        stub.__spec__ = ModuleSpec(name, None)
        stub.__dict__.update(contents)
        sys.modules[name] = stub
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if _is_reference_module(name)]:
            del sys.modules[name]
        sys.modules.update(before)


@dataclass(frozen=True)
class Reference:
    """The modules of the reference, loaded for one device."""

    rome_main: Any
    compute_u: Any
    causal_trace: Any

    @classmethod
    def load(cls, path: Path | None, device: str = "cpu") -> Reference:
        """Load the modules. Raises ReferenceMissing without a checkout."""
        if path is None:
            raise ReferenceMissing(f"There is no checkout of the reference implementation: {INSTALL_HINT}")
        required = [path / "rome" / "rome_main.py", path / "experiments" / "causal_trace.py"]
        if missing := [x for x in required if not x.is_file()]:
            raise ReferenceMissing(
                f"{path} is no checkout of the reference implementation, it lacks {missing[0]}: {INSTALL_HINT}"
            )
        with _reference_importable(path.resolve(), device):
            names = ("rome.rome_main", "rome.compute_u", "experiments.causal_trace")
            return cls(*(import_module(name) for name in names))


@dataclass(frozen=True)
class ReferenceEdit:
    """The update of one edit by the reference."""

    change: LowRank
    losses: list[float]  #: as printed, with three decimals


class ReferenceEditor:
    """The editor of the reference for one model, with the contexts and second moment of the service.

    Its caches are module globals, so only the newest editor may be used.
    """

    def __init__(
        self,
        reference: Reference,
        model: LoadedModel,
        contexts: Sequence[str],
        statistics: KeyStatistics,
        parameters: RomeParameters,
    ) -> None:
        self._model, self._tokenizer = as_reference_model(model), model.tokenizer
        self._rome_main, self._compute_u = reference.rome_main, reference.compute_u
        self._hparams = self._rome_main.ROMEHyperParams(**hyperparameters(model, parameters))
        self._steps = parameters.steps
        self._rome_main.CONTEXT_TEMPLATES_CACHE = ["{}", *(f"{c}. {{}}" for c in contexts)]
        damped = (statistics.cholesky @ statistics.cholesky.T).float()  # the reference computes in fp32
        self._compute_u.layer_stats = lambda *_, **__: SimpleNamespace(
            mom2=SimpleNamespace(moment=lambda: damped)
        )
        self.clear_inverse_cache()

    def clear_inverse_cache(self) -> None:
        """Clear the cached inverse of the second moment."""
        self._compute_u.inv_mom2_cache.clear()

    def compute_inverse(self) -> Tensor:
        """Return the inverse of the second moment, which the first edit computes."""
        h = self._hparams
        layer = h.rewrite_module_tmp.format(h.layers[0])
        with _captured_stdout():
            return self._compute_u.get_inv_cov(self._model, None, layer, h.mom2_dataset, "", h.mom2_dtype)  # type: ignore[no-any-return]

    def edit(self, subject: str, prompt: str, target: str, steps: int | None = None) -> ReferenceEdit:
        """Compute one edit of at most `steps` steps; the model is unchanged."""
        self._hparams.v_num_grad_steps = steps or self._steps
        request = {"subject": subject, "prompt": prompt, "target_new": {"str": target}}
        with _captured_stdout() as output:
            updates = self._rome_main.execute_rome(self._model, self._tokenizer, request, self._hparams)
        ((u, v),) = updates.values()
        losses = [float(x) for x in LOSS_PATTERN.findall(output.getvalue())]
        return ReferenceEdit(LowRank(v.double().cpu()[:, None], u.double().cpu()[None, :]), losses)


def hyperparameters(model: LoadedModel, parameters: RomeParameters) -> dict[str, Any]:
    """Return the hyperparameters of the service under their names in the reference. The stop loss of 0.05 is
    a constant in its code."""
    blocks, down = model.architecture.blocks, model.architecture.down_proj
    block = f"{blocks}.{{}}"
    return {
        "layers": list(parameters.layers),
        "fact_token": "subject_last",
        "v_num_grad_steps": parameters.steps,
        "v_lr": parameters.learning_rate,
        "v_loss_layer": model.num_layers - 1,
        "v_weight_decay": parameters.weight_decay,
        "clamp_norm_factor": parameters.clamp,
        "kl_factor": parameters.kl_factor,
        "mom2_adjustment": True,
        "context_template_length_params": [],
        "rewrite_module_tmp": f"{block}.{down}",
        "layer_module_tmp": block,
        "mlp_module_tmp": f"{block}.{down.rpartition('.')[0]}",
        "attn_module_tmp": f"{block}.{model.architecture.attention}",
        "ln_f_module": model.architecture.final_norm,
        "lm_head_module": model.architecture.lm_head,
        "mom2_dataset": "ours",
        "mom2_n_samples": 0,
        "mom2_dtype": "float32",
    }


class ReferenceTracer:
    """The tracer of the reference for one model."""

    def __init__(self, reference: Reference, model: LoadedModel) -> None:
        self._causal_trace = reference.causal_trace
        self._model, self._tokenizer = as_reference_model(model), model.tokenizer
        self._mt = self._causal_trace.ModelAndTokenizer(model=self._model, tokenizer=self._tokenizer)

    def trace_map(
        self, text: str, subject: str, kind: str, noise: float, rows: str | None = None, samples: int = 10
    ) -> Tensor:
        """Return the map (T, L) of "hidden", "mlp" or "attn"; with `rows="subject_last"` only that row."""
        result = self._causal_trace.calculate_hidden_flow(
            self._mt,
            text,
            subject,
            samples=samples,
            noise=noise,
            token_range=rows,
            kind=None if kind == "hidden" else kind,
        )
        return result["scores"]  # type: ignore[no-any-return]

    def severed(self, text: str, subject: str, cut: str, noise: float, samples: int = 10) -> Tensor:
        """Return the severed path (L,) at the subject's last token.

        The held outputs come from other noise than the run, as in the figure of the paper. The scores
        therefore differ from those of the service; the work is the same.
        """
        causal_trace = self._causal_trace
        tokens = causal_trace.make_inputs(self._tokenizer, [text] * (samples + 1))
        with torch.no_grad():
            answer = causal_trace.predict_from_input(self._model, tokens)[0][0]
        begin, end = causal_trace.find_token_range(self._tokenizer, tokens["input_ids"][0], subject)
        layers = range(self._mt.num_layers)
        held = [(end - 1, causal_trace.layername(self._model, m, cut)) for m in layers]
        scores = [
            causal_trace.trace_with_repatch(
                self._model,
                tokens,
                [(end - 1, causal_trace.layername(self._model, layer))],
                held,
                answer,
                (begin, end),
                noise=noise,
            )
            for layer in layers
        ]
        return torch.stack(scores).cpu()


@contextlib.contextmanager
def _captured_stdout() -> Iterator[io.StringIO]:
    """Capture the output of the reference."""
    buffer = io.StringIO()
    with contextlib.redirect_stdout(buffer):
        yield buffer
