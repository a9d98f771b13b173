"""Synthetic tables of study collaboration, of every size and with every gap."""

import itertools

import numpy as np

from tests.unit.dynamics_tables import interval, made

RELATIONS = (
    *("adj_antonym", "country_capital_city", "country_language", "fruit_inside_color", "name_birthplace"),
    *("name_religion", "object_superclass", "occupation_age", "occupation_gender", "word_first_letter"),
    *("word_last_letter", "work_location_of_a_person_with_a_name_of_some_length"),
)
SERIES = ("qwen1.5-moe-a2.7b", "olmoe-1b-7b", "mixtral-8x7b", "qwen1.5-7b", "llama-7b", "mistral-7b")
SEMANTICS = ("reroute", "reroute_logit", "zero_weight", "min_logit")
METHODS = ("top_neuron_frequency", "top_neuron_count", "routing_frequency", "mean_weight", "summed_lpi")
MAIN = {"step": None}


def bounded(value, random, groups, beginning=""):
    return {f"{beginning}{end}": number for end, number in interval(value, random, groups).items()}


def efficiency_table(series=SERIES, groups=True, published=4):
    random, rows = np.random.default_rng(1), []
    levels = {"hit@10": 0.7, "mrr": 0.5, "ffn_gain": 6.0, "attn_gain": 3.5, "peak_layer": 20.0, "peak_depth": 0.84}
    levels |= {"ffn_share": 0.6, "layer_efficiency": 0.21, "gain_per_active_parameter": 0.004, "gain_share": 1.0}
    for (number, name), (quantity, level) in itertools.product(enumerate(series), levels.items()):
        value = level * random.uniform(0.9, 1.1)
        row = {"series": name, "step": None, "quantity": quantity, **interval(value, random, groups)}
        told = number < published and quantity not in ("ffn_share", "gain_per_active_parameter", "gain_share")
        rows.append({**row, "published": 1.03 * value} if told else row)
    return made(rows, "efficiency")


def gains_table(layers=24, groups=True, seed=0):
    random, rows = np.random.default_rng(seed), []
    for component in ("attn", "ffn"):
        gain = np.exp(-0.5 * ((np.arange(layers) / layers - 0.8) / 0.12) ** 2) + random.normal(0, 0.03, layers)
        base, up = {"step": None, "component": component}, gain.cumsum()
        for layer in range(layers):
            of_layer = (("layer", gain[layer]), ("cumulative", up[layer]), ("share", up[layer] / up[-1]))
            rows += [{**base, "quantity": q, "layer": layer, **interval(v, random, groups)} for q, v in of_layer]
        a, b = 13 * layers // 24, 19 * layers // 24
        for stage, first, end in (("early", 0, a), ("mid", a, b), ("late", b, layers)):
            if first < end:
                total = gain[first:end].sum()
                parts = {"stage_gain": total, "stage_share": total / up[-1]}
                parts["stage_gain_per_layer"] = total / (end - first)
                for quantity, value in parts.items():
                    rows.append({**base, "quantity": quantity, "stage": stage, **interval(value, random, groups)})
    return made(rows, "gains")


def relation_accuracy_table(series=SERIES, relations=RELATIONS, groups=True):
    random, rows = np.random.default_rng(2), []
    for name, relation in itertools.product(series, ("all", "macro", *relations)):
        hit = random.uniform(0.3, 0.95)
        for metric, value in (("hit@10", hit), ("mrr", 0.7 * hit)):
            row = {"series": name, "step": None, "relation": relation, "metric": metric, "prompts": 24}
            rows.append({**row, **interval(value, random, groups)})
    return made(rows, "relation_accuracy")


def budgets_table(k=8, shared=False, groups=True, renormalises=True):
    random, rows, clean = np.random.default_rng(3), [], {"hit@10": 0.83, "mrr": 0.62}
    settings = [("top_n", n) for n in range(k + 1)]
    settings += [(mode, n) for mode in ("only_rank", "drop_rank") for n in range(1, k + 1)]
    for (mode, n), weights, with_shared in itertools.product(settings, ("family", "keep"), (True, False)):
        if not (shared or with_shared):
            continue
        left = {"top_n": n, "only_rank": 0.7 - 0.03 * n, "drop_rank": k - 1 / (n + 1)}[mode] / k
        part = left ** (0.3 if weights == "family" or not renormalises else 0.9) * (1 if with_shared else 0.6)
        for metric, scope in itertools.product(clean, ("all", "relation")):
            value = clean[metric] * (part if mode != "top_n" or n < k or not with_shared else 1.0)
            row = {"step": None, "mode": mode, "size": n, "weights": weights, "shared": with_shared, "scope": scope}
            row |= {"name": None if scope == "all" else "r", "average": "micro", "metric": metric, "prompts": 906}
            row |= interval(value, np.random.default_rng(1), groups)
            rows.append(row | bounded(1 - value / clean[metric], random, groups, "drop_"))
    return made(rows, "budgets")


def blocking_table(
    relations=RELATIONS, semantics=SEMANTICS, sizes=(1, 5, 10), groups=True, crossfit=True, controls=True
):
    random, rows = np.random.default_rng(4), []
    conditions = [("none", False, 1.15)] + [("none", True, 1.0)] * crossfit
    conditions += [("matched", crossfit, 0.3), ("random", False, 0.1)] * controls
    scopes = [("all", None), *(("relation", name) for name in relations)]
    for scope, how, size, (control, fitted, part) in itertools.product(scopes, semantics, sizes, conditions):
        value = part * (0.08 * size) * random.uniform(-0.3, 1.0) if scope[1] else part * 0.04 * size
        if scope[1] == "occupation_age":
            continue  # its clean MRR is 0
        row = {"step": None, "semantics": how, "size": size, "control": control, "crossfit": fitted}
        row |= {"scope": scope[0], "name": scope[1], "average": "micro", "metric": "mrr", "clean": 0.6}
        row |= {"blocked": 0.6 * (1 - value), "prompts": 24, "seeds": 0 if control == "none" else 5}
        row |= interval(value, random, groups)
        if control != "none" and crossfit and groups:
            row |= {"excess_value": 0.1, "excess_low": random.uniform(-0.05, 0.05), "excess_high": 0.2}
        rows.append(row)
    return made(rows, "blocking")


def expert_overlap_table(relations=RELATIONS, methods=METHODS, published=True):
    random, rows = np.random.default_rng(5), []
    for relation, (one, other) in itertools.product(relations, itertools.combinations((*methods, "published"), 2)):
        if published or other != "published":
            row = {"step": None, "relation": relation, "method": one, "other": other, "size": 5, "other_size": 5}
            row |= {"common": int(random.integers(0, 6)), "chance": 0.017, "chance_given_layers": 0.43, "p": 0.2}
            rows.append(row)
    return made(rows, "expert_overlap")


def associations_table(relations=RELATIONS, pairs=10, folds=True):
    random, rows = np.random.default_rng(6), []

    def add(relation, fold, number, searched, level):
        for i in range(number):
            r = (level - 0.02 * i) * (1 if i % 3 else -1)
            row = {"relation": relation, "fold": fold, "head_layer": 3, "head": i, "layer": 12 + i % 9, "expert": 7 * i}
            row |= {"r": r, "p": 0.04, "null_median": 0.5, "null_95": 0.62, "pairs": searched, "prompts": 453}
            if fold is not None:
                row |= {"r_tested": 0.6 * r if i != 4 else -0.1, "p_tested": 0.2}
            rows.append(row)

    for fold in (None, 0, 1) if folds else (None,):
        add(None, fold, pairs, 288_000, 0.85)
    for relation in relations:
        add(relation, None, 9, 9, random.uniform(0.4, 0.95))
    return made(rows, "associations")


EFFECTS = {"gate_drop": 0.3, "expert_gate_drop": 0.5, "mrr_drop": 0.25, "forced_mrr": 0.9, "recovery": 0.4}
EFFECTS |= {"gradient_share": 0.28, "gradient_share_with_rest": 0.11, "gradient_gap": 0.002}


def causality_table(pairs=20, groups=True, controls=True, named=False, both=True):
    """``both``: every third pair is of negative sign; else all are positive, named ones of no sign."""
    random, rows = np.random.default_rng(7), []
    chosen = [
        (
            3,
            i % 10,
            12 + i % 9,
            7 * (i % 10),
            None if named else i // 10,
            None if named else "-+"[i % 3 > 0 or not both],
        )
        for i in range(pairs)
    ]
    names = ("head_layer", "head", "layer", "expert", "fold", "sign")
    signs = sorted({pair[5] for pair in chosen} - {None})
    pools = [(*(None,) * 5, sign) for sign in (None, *signs)]
    for pair, (quantity, level) in itertools.product((*chosen, *pools), EFFECTS.items()):
        for gate_layer in (None, 12, 13) if quantity == "gate_drop" and pair[0] is not None else (None,):
            value = level * random.uniform(0.3, 1.5)
            if quantity == "expert_gate_drop" and pair[5] == "-":
                value = -value
            row = {"step": None, **dict(zip(names, pair, strict=True)), "quantity": quantity, "gate_layer": gate_layer}
            row |= {**interval(value, random, groups), "prompts": 453}
            if quantity.startswith("gradient_share"):
                row |= {"control_value": 1 / 16, "excess_value": value - 1 / 16}
            elif controls and quantity != "gradient_gap":
                row |= bounded(0.4 * value if quantity != "forced_mrr" else 0.7, random, groups, "control_")
            rows.append(row)
    return made(rows, "causality")


def neuron_types_table(relations=RELATIONS, kinds=("routed", "shared"), groups=True):
    random, rows = np.random.default_rng(8), []
    scopes = [("all", None), *(("relation", name) for name in relations)]
    chances = {"routed": (0.5, 0.94), "shared": (0.45, 0.055), "dense": (0.05, 0.005)}
    for top, (scope, name), ranking in itertools.product((100, 200, 300), scopes, ("per_prompt", "aggregate")):
        routed = (
            0.25 + 0.0006 * top + random.uniform(-0.1, 0.1) * (scope == "relation") - 0.05 * (ranking == "aggregate")
        )
        for kind in kinds:
            value = {"routed": routed, "shared": 0.97 - routed, "dense": 0.03}[kind]
            row = {"step": None, "top": top, "ranking": ranking, "scope": scope, "name": name, "kind": kind}
            row |= interval(value, random, groups and ranking == "per_prompt")
            rows.append({**row, "chance_active": chances[kind][0], "chance_all": chances[kind][1]})
    return made(rows, "neuron_types")


def neuron_overlap_table(relations=RELATIONS, kinds=("all", "shared", "routed"), groups=True, strangers=True):
    random, rows = np.random.default_rng(9), []
    for kind in kinds:
        base = {"step": None, "kind": kind, "chance": {"all": 0.004, "shared": 0.009, "routed": 0.02}[kind]}
        for one, other in itertools.combinations(relations, 2):
            value = random.uniform(0.02, 0.12)
            rows.append({**base, "comparison": "relations", "relation": one, "other": other, "value": value})
        for relation in relations:
            numbers = interval(random.uniform(0.15, 0.4), random, groups)
            rows.append({**base, "comparison": "samples", "relation": relation, **numbers})
        if strangers:
            rows.append({**base, "comparison": "strangers", **interval(0.07, random, groups)})
    return made(rows, "neuron_overlap")
