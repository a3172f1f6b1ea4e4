"""The GPU fields of the spawn page, with the size of each GPU slice in MiB and whether it is free now."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from typing import Any

from .options import FLAGS, GPUOptions, Limits, name_of

#: The id of these fields, so that a form that is rendered twice contains them once.
MARK = "gpupool-options"

_SCRIPT = """\
(() => {
  const box = document.currentScript.closest('fieldset');
  const offer = JSON.parse(box.dataset.offer);
  const at = name => box.querySelector(`[name=gpupool_${name}]`);
  const count = at('num_gpus'), share = at('partial'), model = at('model'), spread = at('spread');
  const said = box.querySelector('output');
  const round = (part, mib) => Math.floor(Math.round(part * 1e6) * mib / 1e6);
  const gpus = server => server.gpus.filter(g => g.healthy && (!model.value || g.name === model.value));
  const groups = () => spread.checked ? [offer.servers.flatMap(gpus)] : offer.servers.map(gpus);
  const fits = (n, test) => groups().some(group => group.filter(test).length >= n);
  const judge = (n, part) => {
    if (n === 0) return '';
    if (offer.servers.flatMap(gpus).length < n) return 'more than the pool has';
    if (!fits(n, () => true)) return 'only of several servers';
    const free = fits(n, g => g.memory_mib - g.granted_mib >= round(part, g.memory_mib));
    return free ? 'free now' : 'you would wait in the queue';
  };
  const look = () => {
    const part = Number(share.value);
    for (const option of count.options) {
      const n = Number(option.value), verdict = judge(n, part);
      option.disabled = verdict.startsWith('more than') || Boolean(offer.reason && n);
      option.text = n ? `${n}: ${offer.reason ? 'not available now' : verdict}` : '0: no GPU';
    }
    const n = Number(count.value);
    for (const other of [share, model, spread, at('never_park')]) other.disabled = n === 0;
    const outside = !(part >= Number(share.min) && part <= Number(share.max));
    if (n && outside && !offer.reason) {
      said.value = `choose a share from ${share.min} to ${share.max}`;
      return;
    }
    const size = g => `${round(part, g.memory_mib).toLocaleString()} MiB of a ${g.name}`;
    const sizes = [...new Set(offer.servers.flatMap(gpus).map(size))];
    said.value = offer.reason || (n ? `${n} × ${sizes.join(' or ')}: ${judge(n, part)}` : '');
  };
  box.addEventListener('input', look);
  look();
})();
"""


def merged(form: str, limits: Limits, offer: Mapping[str, Any], said: Mapping[str, Any]) -> str:
    """Return ``form`` with the GPU fields at its end.

    ``offer`` is the service's answer: ``{"servers": [{"gpus": […]}], "reason"}``.
    ``said`` is what the user chose last time.
    """
    return form if MARK in form else f"{form}\n{ours(limits, offer, said)}"


def ours(limits: Limits, offer: Mapping[str, Any], said: Mapping[str, Any]) -> str:
    """Return the GPU fields as HTML. They work without scripts; the script adds sizes and what is free."""
    gpus = [gpu for server in offer["servers"] for gpu in server["gpus"] if gpu["healthy"]]
    chosen = said.get("num_gpus", limits.default_gpus)
    counts = [
        (str(n), "no GPU" if n == 0 else _count(n, offer), n == chosen, bool(n and _why_not(n, offer)))
        for n in range(limits.max_gpus + 1)
    ]
    names = sorted({gpu["name"] for gpu in gpus if not limits.models or gpu["name"] in limits.models})
    models = [("", "any", not said.get("model"), False)]
    models += [(name, name, name == said.get("model"), False) for name in names]
    share = said.get("partial", limits.default_partial)
    name = name_of("partial")
    number = (
        f'<input class="form-control mb-2" type="number" id="{name}" name="{name}" min="{limits.least:g}"'
        f' max="{limits.most:g}" step="{limits.step:g}" value="{escape(str(share))}" required>'
    )
    flags = "\n".join(_checkbox(field, said.get(field) is True) for field in FLAGS)
    return f"""\
<fieldset id="{MARK}" data-offer="{escape(json.dumps(_public(offer)))}">
<legend>Request GPUs{_emulated(gpus)}</legend>
{_select("num_gpus", counts)}
{_labelled("partial", number)}
{_select("model", models)}
{flags}
<p><output aria-live="polite">{escape(str(offer.get("reason", "")))}</output></p>
<script>{_SCRIPT}</script>
</fieldset>"""


def _public(offer: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the script needs, without anybody's name."""
    kept = ("name", "memory_mib", "granted_mib", "healthy")
    servers = [{"gpus": [{k: gpu[k] for k in kept} for gpu in s["gpus"]]} for s in offer["servers"]]
    return {"servers": servers, "reason": offer.get("reason", "")}


def _why_not(count: int, offer: Mapping[str, Any]) -> str:
    if offer.get("reason"):
        return "not available now"
    return "more than the pool has" if count > sum(_healthy(offer)) else ""


def _count(count: int, offer: Mapping[str, Any]) -> str:
    several = ", only of several servers" if count > max(_healthy(offer), default=0) else ""
    return _why_not(count, offer) or f"{count} GPU{'s' * (count > 1)}{several}"


def _healthy(offer: Mapping[str, Any]) -> list[int]:
    """How many healthy GPUs each server has."""
    return [sum(gpu["healthy"] for gpu in server["gpus"]) for server in offer["servers"]]


def _emulated(gpus: list[Mapping[str, Any]]) -> str:
    return " (emulated: the CPU computes)" if gpus and all(g["emulated"] for g in gpus) else ""


def _select(field: str, entries: list[tuple[str, str, bool, bool]]) -> str:
    lines = [
        f'<option value="{escape(value)}"{" selected" * selected}{" disabled" * disabled}>'
        f"{escape(f'{value}: {text}' if value.isdigit() else text)}</option>"
        for value, text, selected, disabled in entries
    ]
    name = name_of(field)
    return _labelled(
        field,
        f'<select class="form-control form-select mb-2" id="{name}" name="{name}">\n'
        + "\n".join(lines)
        + "\n</select>",
    )


def _checkbox(field: str, checked: bool) -> str:
    name = name_of(field)
    return (
        f'<div class="form-check mb-2"><input class="form-check-input" type="checkbox" id="{name}" name="{name}"'
        f' value="1"{" checked" * checked}>\n'
        f'<label class="form-check-label" for="{name}">{_label(field)}</label></div>'
    )


def _labelled(field: str, control: str) -> str:
    return f'<label for="{name_of(field)}">{_label(field)}</label>\n{control}'


def _label(field: str) -> str:
    return escape(GPUOptions.__dataclass_fields__[field].metadata["label"])
