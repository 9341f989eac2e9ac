"""The flat remote-code bundle: this package's models in five files that a checkpoint takes with it.

`AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True)` copies files of a repository by their names,
without folders, and looks for their relative imports. So the modules of `kalman_kernels` and `hf_kalman` are joined,
in the order of their imports; a name that several of them define gets its module's name in front. Same sources, same
bytes.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import Counter
from pathlib import Path
from textwrap import indent
from typing import NamedTuple

from transformers import AutoModel, AutoModelForCausalLM

import kalman_kernels

from ..gka.configuration_gka import GKAConfig
from ..kla.configuration_kla import KLAConfig
from ..registration import ARCHITECTURES

__all__ = ["AUTO_MAPS", "FILES", "bundle", "write_bundle"]

# Files of the bundle, and their modules in an order in which none needs a later one.
FILES = {
    "configuration_hf_kalman": [
        "hf_kalman.configuration",
        "hf_kalman.gka.configuration_gka",
        "hf_kalman.kla.configuration_kla",
    ],
    "ops_hf_kalman": [
        "kalman_kernels.dispatch",
        "kalman_kernels.in_place",
        "kalman_kernels.numerics",
        "kalman_kernels.segments",
        "kalman_kernels.norm.op",
        "kalman_kernels.conv.reference",
        "kalman_kernels.conv.op",
        "kalman_kernels.gka.reference",
        "kalman_kernels.gka.limits",
        "kalman_kernels.gka.mixer",
        "kalman_kernels.gka.chunked",
        "kalman_kernels.gka.op",
        "kalman_kernels.kla.reference",
        "kalman_kernels.kla.scan",
        "kalman_kernels.kla.op",
        "kalman_kernels.layers",
    ],
    "kernels_hf_kalman": [
        "kalman_kernels.jit",
        "kalman_kernels.norm.triton_norm",
        "kalman_kernels.conv.triton_conv",
        "kalman_kernels.gka.triton_common",
        "kalman_kernels.gka.triton_forward",
        "kalman_kernels.gka.triton_backward",
        "kalman_kernels.gka.triton_states",
        "kalman_kernels.gka.triton_few",
        "kalman_kernels.gka.gluon_few",
        "kalman_kernels.gka.triton_token",
        "kalman_kernels.gka.triton_step",
        "kalman_kernels.kla.triton_forward",
        "kalman_kernels.kla.triton_backward",
    ],
    "decoder_hf_kalman": [
        "hf_kalman.cache",
        "hf_kalman.packing",
        "hf_kalman.layers",
        "hf_kalman.decoder",
    ],
    "modeling_hf_kalman": [
        "hf_kalman.gka.modeling_gka",
        "hf_kalman.kla.modeling_kla",
    ],
}
_CONFIGS = (GKAConfig, KLAConfig)
# {model type: `auto_map` of its config.json}
AUTO_MAPS = {
    config.model_type: {
        "AutoConfig": f"configuration_hf_kalman.{config.__name__}",
        **{auto.__name__: f"modeling_hf_kalman.{model.__name__}" for auto, model in ARCHITECTURES[config].items()},
    }
    for config in _CONFIGS
}
_ROOTS = {
    "hf_kalman": Path(__file__).parents[1],
    "kalman_kernels": Path(kalman_kernels.__file__).parent,
}
# Where a missing Triton is no error: the host checks the imports of every file outside `try`.
_TRITON = """try:
{imports}
except ImportError as error:
    raise ImportError("The Triton kernels need `pip install triton`.") from error
"""
_HEADER = '''"""{title}

Generated from hf-kalman {version} (Apache-2.0) by `hf_kalman.hub.write_bundle`; do not edit. With hf-kalman installed,
its own classes are used instead.
"""

# ruff: noqa
# pyright: basic, reportAttributeAccessIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
'''
_TITLES = {
    "configuration_hf_kalman": "Configurations of Gated KalmaNet and Kalman Linear Attention.",
    "ops_hf_kalman": "The operators on torch: Gated KalmaNet, Kalman Linear Attention, short convolution, gated norm.",
    "kernels_hf_kalman": "The operators as Triton kernels.",
    "decoder_hf_kalman": "Cache, packing and decoder that both families share.",
    "modeling_hf_kalman": "Gated KalmaNet and Kalman Linear Attention models.",
}
_REGISTER = '''

def _register_first(head, model):
    """The host's generic heads look up which model belongs to a configuration."""
    begin = head.__init__

    def __init__(self, config, *args, **kwargs):
        AutoModel.register(type(config), model, exist_ok=True)
        begin(self, config, *args, **kwargs)

    head.__init__ = __init__
'''


class _Module(NamedTuple):
    """One source file, taken apart."""

    name: str
    source: str
    tree: ast.Module
    defined: frozenset[str]


def bundle() -> dict[str, str]:
    """{file name: text} of the bundle; the same at every call."""
    modules = {name: _read(name) for names in FILES.values() for name in names}
    counts = Counter(name for module in modules.values() for name in module.defined)
    # (module, name) -> name in the bundle, unique over all files.
    final = {
        (module.name, name): name if counts[name] == 1 else _qualified(module.name, name)
        for module in modules.values()
        for name in sorted(module.defined)
    }
    return {f"{file}.py": _joined(file, modules, final) for file in FILES}


def write_bundle(folder: str | Path) -> list[Path]:
    """Write the bundle's files into a folder; the paths."""
    paths = []
    for name, text in bundle().items():
        paths.append(Path(folder) / name)
        paths[-1].write_text(text, encoding="utf-8")
    return paths


def _read(name: str) -> _Module:
    root, *parts = name.split(".")
    source = _ROOTS[root].joinpath(*parts).with_suffix(".py").read_text(encoding="utf-8")
    tree = ast.parse(source)
    defined = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            defined |= {n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}
    return _Module(name, source, tree, frozenset(defined - {"__all__"}))


def _qualified(module: str, name: str) -> str:
    tag = "_".join(module.split(".")[1:])
    return f"_{tag}{name}" if name.startswith("_") else f"{tag}_{name}"


def _source_of(module: str, name: str) -> tuple[str, str]:
    """(module, name) where a name that a module or package offers is defined."""
    root, *parts = module.split(".")
    path = _ROOTS[root].joinpath(*parts)
    if not path.is_dir():
        return module, name
    for node in ast.parse((path / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and any(alias.name == name for alias in node.names):
            return _source_of(_absolute(node, f"{module}.__init__"), name)
    raise RuntimeError(f"bundle: {module!r} offers no {name!r}.")


def _absolute(node: ast.ImportFrom, module: str) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".")[: -node.level]
    return ".".join([*parts, node.module] if node.module else parts)


def _own(node: ast.stmt, module: str) -> bool:
    return isinstance(node, ast.ImportFrom) and _absolute(node, module).split(".")[0] in _ROOTS


def _joined(file: str, modules: dict[str, _Module], final: dict[tuple[str, str], str]) -> str:
    place = {name: f for f, names in FILES.items() for name in names}
    outside, other, late, bodies = {}, {}, {}, []
    for name in FILES[file]:
        module = modules[name]
        renamed = {own: final[name, own] for own in module.defined}
        removed: list[ast.stmt] = []
        if ast.get_docstring(module.tree) is not None:
            removed.append(module.tree.body[0])
        for node in module.tree.body:
            guarded = isinstance(node, ast.If) and all(_own(n, name) for n in node.body)
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                removed.append(node)
            elif guarded or _own(node, name):
                removed.append(node)
                wanted = late if guarded else other
                for one in node.body if isinstance(node, ast.If) else [node]:
                    assert isinstance(one, ast.ImportFrom)
                    for alias in one.names:
                        source = _source_of(_absolute(one, name), alias.name)
                        renamed[alias.asname or alias.name] = final[source]
                        if place[source[0]] != file:
                            wanted.setdefault(place[source[0]], set()).add(final[source])
            elif isinstance(node, ast.Import | ast.ImportFrom):
                removed.append(node)
                source = node.module if isinstance(node, ast.ImportFrom) else None
                outside.setdefault(source, set()).update(
                    a.name + (f" as {a.asname}" if a.asname else "") for a in node.names
                )
        text = _rewritten(module, renamed, removed, final, place)
        bodies.append(f"\n\n# {name}\n\n{text.strip()}\n")
    return _assembled(file, outside, other, late, bodies)


def _assembled(file: str, outside: dict, other: dict, late: dict, bodies: list[str]) -> str:
    from .. import __version__

    body = "".join(bodies)
    outside = {source: names - {"TYPE_CHECKING"} for source, names in outside.items()}
    if file == "modeling_hf_kalman":
        outside["transformers"] = outside.get("transformers", set()) | {"AutoModel"}
    modules = outside.pop(None, set())
    future, triton = outside.pop("__future__", None), {name for name in modules if name.startswith("triton")}
    of_triton = {source for source in outside if source.startswith("triton")}
    guarded = [f"import {name}\n" for name in sorted(triton)]
    guarded += [_import_line(source, outside.pop(source)) for source in sorted(of_triton)]
    parts = [_HEADER.format(title=_TITLES[file], version=__version__)]
    parts += ["\nfrom __future__ import annotations\n"] if future else []
    parts += ["\n", *(f"import {name}\n" for name in sorted(modules - triton))]
    parts += [_import_line(source, names) for source, names in sorted(outside.items()) if names]
    parts += ["\n", _TRITON.format(imports=indent("".join(guarded), "    ").rstrip())] if guarded else []
    parts += ["\n", *(_import_line(f".{name}", names) for name, names in sorted(other.items()))] if other else []
    parts += [body]
    if late:
        # Last: the kernels' file needs what stands above.
        parts += ["\n\nif HAS_TRITON:\n"]
        parts += [f"    {_import_line(f'.{name}', names)}" for name, names in sorted(late.items())]
    parts += [_handover(file)]
    return "".join(parts)


def _import_line(source: str, names: set[str]) -> str:
    return f"from {source} import {', '.join(sorted(names))}\n"


def _handover(file: str) -> str:
    """The installed package's classes in place of the bundle's."""
    classes = {
        "configuration_hf_kalman": [[config] for config in _CONFIGS],
        "modeling_hf_kalman": [list(ARCHITECTURES[config].values()) for config in _CONFIGS],
    }.get(file)
    if classes is None:
        return ""
    text, otherwise = "", "    pass\n"
    if file == "modeling_hf_kalman":
        pairs = [
            (head, ARCHITECTURES[config][AutoModel])
            for config in _CONFIGS
            for auto, head in ARCHITECTURES[config].items()
            if auto not in (AutoModel, AutoModelForCausalLM)
        ]
        text = _REGISTER
        otherwise = "".join(f"    _register_first({head.__name__}, {model.__name__})\n" for head, model in pairs)
    lines = [f"    from {own[0].__module__} import {', '.join(c.__name__ for c in own)}\n" for own in classes]
    return f"{text}\n\ntry:  # an installed package wins\n{''.join(lines)}except ImportError:\n{otherwise}"


def _rewritten(module, renamed, removed, final, place) -> str:
    """A module's text without the removed statements, with its names of the bundle."""
    changed = {old: new for old, new in renamed.items() if old != new}
    edits = _renames(module, changed)
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ImportFrom) and node not in removed and _own(node, module.name):
            # Inside a function.
            source = [_source_of(_absolute(node, module.name), alias.name) for alias in node.names]
            names = [
                final[s] if final[s] == a.name else f"{final[s]} as {a.name}"
                for s, a in zip(source, node.names, strict=True)
            ]
            text = f"from .{place[source[0][0]]} import {', '.join(names)}"
            edits[node.lineno, node.col_offset] = (node.end_col_offset or 0, text)
    lines = module.source.splitlines()
    for (line, start), (end, text) in sorted(edits.items(), reverse=True):
        raw = lines[line - 1].encode()
        lines[line - 1] = (raw[:start] + text.encode() + raw[end:]).decode()
    gone = {n for node in removed for n in range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    kept = [text for number, text in enumerate(lines, 1) if number not in gone and not text.startswith("# pyright:")]
    return re.sub(r"\n{4,}", "\n\n\n", "\n".join(kept))


class _Uses(ast.NodeVisitor):
    """The `Name` nodes that mean a name of the module, and no local variable of the same name."""

    def __init__(self, names: set[str]) -> None:
        self.names, self.locals, self.found = names, [], []

    def visit_Name(self, node: ast.Name) -> None:  # noqa: D102, N802
        if node.id in self.names and not any(node.id in scope for scope in self.locals):
            self.found.append(node)

    def _function(self, node: ast.FunctionDef | ast.Lambda) -> None:
        a = node.args
        every = [*a.posonlyargs, *a.args, *a.kwonlyargs, *(x for x in (a.vararg, a.kwarg) if x is not None)]
        # Decorators, defaults and annotations stand outside.
        outside = [*a.defaults, *(d for d in a.kw_defaults if d is not None)]
        outside += [x.annotation for x in every if x.annotation is not None]
        body = [node.body] if isinstance(node, ast.Lambda) else node.body
        if isinstance(node, ast.FunctionDef):
            outside += [*node.decorator_list, *([node.returns] if node.returns is not None else [])]
        for part in outside:
            self.visit(part)
        stored = {n.id for b in body for n in ast.walk(b) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        self.locals.append(stored | {x.arg for x in every})
        for part in body:
            self.visit(part)
        self.locals.pop()

    visit_FunctionDef = visit_Lambda = _function  # noqa: N815


def _renames(module: _Module, changed: dict[str, str]) -> dict[tuple[int, int], tuple[int, str]]:
    """{(line, first byte): (byte after, text)} for every use and definition of a changed name."""
    edits, uses = {}, _Uses(set(changed))
    uses.visit(module.tree)
    for node in uses.found:
        edits[node.lineno, node.col_offset] = (node.col_offset + len(node.id), changed[node.id])
    tops = {n.lineno for n in module.tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name in changed}
    previous = ""
    for token in tokenize.generate_tokens(io.StringIO(module.source).readline):
        if previous in ("def", "class") and token.start[0] in tops:
            edits[token.start] = (token.end[1], changed[token.string])
        previous = token.string
    return edits
