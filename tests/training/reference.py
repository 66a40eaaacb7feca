"""The objectives as the papers tell them, slowly: each draft of each row is computed as a server would come to it.

To draft its (i+1)-th token after the text x_0..x_{t+1}, the head runs over the target's features f_0..f_t and then over
its own features of the i drafts before: one plain causal forward over t+1+i rows, of which the last one counts.
Nothing is cached and nothing is shared with the code under test but the names of the published tensors.
"""

import torch

DECAY = 0.8


def rms_norm(x, weight, eps):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def rope(x, position, theta):
    """One head's vector x [N] at one position: the pairs (j, j + N/2) turn by position * theta^(-2j/N)."""
    half = len(x) // 2
    angle = position * theta ** (-2 * torch.arange(half) / len(x))
    turned = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones(half), angle)
    return torch.cat([turned.real, turned.imag])


def causal_attention(weights, prefix, rows, config):
    """Llama's attention over the rows [S, E], whose positions are 0, 1, 2, ..."""
    size = config.hidden_size // config.num_attention_heads
    theta = config.rope_parameters["rope_theta"]
    group = config.num_attention_heads // config.num_key_value_heads

    def project(name):
        bias = weights.get(f"{prefix}{name}_proj.bias", torch.zeros(()))
        return (rows @ weights[f"{prefix}{name}_proj.weight"].T + bias).reshape(len(rows), -1, size)

    q, k, v = project("q"), project("k"), project("v")
    q, k = (
        torch.stack([torch.stack([rope(x, s, theta) for x in heads]) for s, heads in enumerate(all_heads)])
        for all_heads in (q, k)
    )
    outputs = []
    for s in range(len(rows)):
        heads = []
        for h in range(config.num_attention_heads):
            scores = k[: s + 1, h // group] @ q[s, h] / size**0.5
            heads.append(torch.softmax(scores, 0) @ v[: s + 1, h // group])
        outputs.append(torch.cat(heads))
    return torch.stack(outputs) @ weights[f"{prefix}o_proj.weight"].T


def mlp(weights, prefix, x):
    gate = x @ weights[f"{prefix}gate_proj.weight"].T
    return (gate / (1 + torch.exp(-gate)) * (x @ weights[f"{prefix}up_proj.weight"].T)) @ weights[
        f"{prefix}down_proj.weight"
    ].T


def eagle3_rows(weights, embedded, features, config):
    """Features of the head's own width [S, D] to its outputs."""
    eps = config.rms_norm_eps
    inputs = torch.cat(
        [
            rms_norm(embedded, weights["midlayer.input_layernorm.weight"], eps),
            rms_norm(features, weights["midlayer.hidden_norm.weight"], eps),
        ],
        dim=-1,
    )
    y = features + causal_attention(weights, "midlayer.self_attn.", inputs, config)
    return y + mlp(weights, "midlayer.mlp.", rms_norm(y, weights["midlayer.post_attention_layernorm.weight"], eps))


def eagle_rows(weights, embedded, features, config):
    x = torch.cat([embedded, features], dim=-1) @ weights["fc.weight"].T + weights["fc.bias"]
    y = x + causal_attention(weights, "layers.0.self_attn.", x, config)
    norm = weights["layers.0.post_attention_layernorm.weight"]
    return y + mlp(weights, "layers.0.mlp.", rms_norm(y, norm, config.rms_norm_eps))


def mtp_rows(weights, embedded, features, config):
    def norm(x, name):
        return rms_norm(x, weights[f"{name}.weight"], config.rms_norm_eps)

    embedded = torch.cat([torch.zeros_like(embedded[:1]), embedded[1:]])
    x = torch.cat([norm(features, "hidden_layernorm"), norm(embedded, "token_layernorm")], dim=-1)
    x = x @ weights["input_proj.weight"].T
    y = x + causal_attention(weights, "self_attn.", norm(x, "input_layernorm"), config)
    return norm(y + mlp(weights, "mlp.", norm(y, "post_attention_layernorm")), "final_layernorm")


def observe(model, tokens):
    """What went through the target: the inputs of its layers, and of its LM head."""
    seen = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, k=k: seen.update({k: args[0][0]}))
        for k, layer in enumerate(model.model.layers)
    ]
    hooks.append(model.lm_head.register_forward_pre_hook(lambda _, args: seen.update(final=args[0][0])))
    with torch.no_grad():
        model(torch.tensor([tokens]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def cross_entropy(logits, probabilities):
    return -(probabilities * torch.log_softmax(logits, -1)).sum()


def unroll(rows_forward, weights, model, tokens, features, t, length):
    """The outputs of row t's drafts."""
    outputs = []
    for i in range(length):
        entering = torch.cat([features[: t + 1], *(z[None] for z in outputs)])
        embedded = model.model.embed_tokens.weight[torch.tensor(tokens[1 : t + 2 + i])]
        outputs.append(rows_forward(weights, embedded, entering, model.config)[-1])
    return outputs


def objective(algorithm, weights, model, samples, length):
    """Sum of the losses over all rows of all samples, and the right drafts per step.

    The draft i of row t foresees x_{t+2+i}, which the target itself foresees at position t+1+i; it counts where
    x_{t+1+i} and x_{t+2+i} both belong to the response.
    """
    loss, correct, rows = 0.0, [0] * length, [0] * length
    for prompt, response in samples:
        tokens = prompt + response
        seen = observe(model, tokens)
        final, head = seen["final"], model.lm_head.weight
        features = final
        if algorithm == "eagle3":
            n = model.config.num_hidden_layers
            features = torch.cat([seen[2], seen[n // 2], seen[n - 3]], dim=-1) @ weights["fc.weight"].T
        forward = {"eagle3": eagle3_rows, "eagle": eagle_rows, "mtp": mtp_rows}[algorithm]
        for t in range(len(tokens) - 2):
            drafts = [i for i in range(length) if len(prompt) <= t + 1 + i and t + 2 + i < len(tokens)]
            if not drafts:
                continue
            outputs = unroll(forward, weights, model, tokens, features, t, drafts[-1] + 1)
            for i in drafts:
                z, at = outputs[i], t + 1 + i
                teacher = final[at] @ head.T
                choice = int(teacher.argmax())
                if algorithm == "eagle3":
                    ids = weights["d2t"] + torch.arange(len(weights["d2t"]))
                    logits = (
                        rms_norm(z, weights["norm.weight"], model.config.rms_norm_eps) @ weights["lm_head.weight"].T
                    )
                    right = int(ids[logits.argmax()]) == choice
                    inside = choice in ids.tolist()
                    term = cross_entropy(logits, torch.softmax(teacher[ids], -1)) if inside else 0.0
                elif algorithm == "eagle":
                    logits = z @ head.T
                    right = int(logits.argmax()) == choice
                    distance = (z - final[at]).abs()
                    smooth_l1 = torch.where(distance < 1, distance**2 / 2, distance - 0.5).mean()
                    term = smooth_l1 + 0.1 * cross_entropy(logits, torch.softmax(teacher, -1))
                else:
                    logits = z @ head.T
                    right = int(logits.argmax()) == tokens[at + 1]
                    term = -torch.log_softmax(logits, -1)[tokens[at + 1]]
                loss = loss + DECAY**i * term
                correct[i] += right
                rows[i] += 1
    return loss, correct, rows
