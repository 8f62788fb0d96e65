"""The Transformer of the paper, written out plainly: what the model is compared with."""

import math

import torch
from torch import nn
from torch.nn import functional as F


class PaperTransformer(nn.Module):
    """Sections 3.1 to 3.5 of the paper, one sequence at a time, from a Transformer's weights."""

    def __init__(self, model):
        super().__init__()
        self.weights = nn.ParameterDict(
            {name.replace(".", "/"): p.detach().clone() for name, p in model.named_parameters()}
        )
        self.config = model.config

    def forward(self, sources, targets):
        """Two lists of id lists -> list of logits [T, V]."""
        return [self.predict(self.encode(s), t) for s, t in zip(sources, targets, strict=True)]

    def w(self, name):
        return self.weights[name.replace(".", "/")]

    def embed(self, ids):
        d = self.config.hidden_size
        table = torch.zeros(len(ids), d, dtype=torch.float64)
        for p in range(len(ids)):
            for i in range(d // 2):
                angle = p / 10000 ** (2 * i / d)
                table[p, 2 * i], table[p, 2 * i + 1] = math.sin(angle), math.cos(angle)
        words = self.w("embedding.weight")[torch.tensor(ids, dtype=torch.int64)]
        return words * math.sqrt(d) + table.to(words.dtype)

    def norm(self, name, x):
        size = (x.shape[-1],)
        eps = self.config.layer_norm_eps
        return F.layer_norm(x, size, self.w(f"{name}.weight"), self.w(f"{name}.bias"), eps)

    def attend(self, name, projections, q_in, kv_in, causal):
        heads = self.config.num_attention_heads
        (wq, bq), (wk, bk), (wv, bv) = projections
        q, k, v = q_in @ wq.T + bq, kv_in @ wk.T + bk, kv_in @ wv.T + bv
        out = []
        for h in range(heads):
            columns = slice(h * q.shape[1] // heads, (h + 1) * q.shape[1] // heads)
            scores = q[:, columns] @ k[:, columns].T / math.sqrt(q.shape[1] // heads)
            if causal:
                scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
            out.append(scores.softmax(-1) @ v[:, columns])
        return torch.cat(out, 1) @ self.w(f"{name}.output.weight").T + self.w(f"{name}.output.bias")

    def self_attention(self, name, x, causal):
        parts = zip(
            self.w(f"{name}.qkv.weight").chunk(3), self.w(f"{name}.qkv.bias").chunk(3), strict=True
        )
        return self.attend(name, list(parts), x, x, causal)

    def cross_attention(self, name, x, source):
        query = (self.w(f"{name}.query.weight"), self.w(f"{name}.query.bias"))
        parts = zip(
            self.w(f"{name}.kv.weight").chunk(2), self.w(f"{name}.kv.bias").chunk(2), strict=True
        )
        return self.attend(name, [query, *parts], x, source, False)

    def feed_forward(self, name, x):
        h = F.relu(x @ self.w(f"{name}.up.weight").T + self.w(f"{name}.up.bias"))
        return h @ self.w(f"{name}.down.weight").T + self.w(f"{name}.down.bias")

    def sublayer(self, norm, x, function):
        if self.config.prenorm:
            return x + function(self.norm(norm, x))
        return self.norm(norm, x + function(x))

    def encode(self, ids):
        x = self.embed(ids)
        for i in range(self.config.num_layers):
            at = f"encoder.{i}"
            x = self.sublayer(
                f"{at}.attention_norm",
                x,
                lambda h, at=at: self.self_attention(f"{at}.attention", h, False),
            )
            x = self.sublayer(
                f"{at}.feed_forward_norm",
                x,
                lambda h, at=at: self.feed_forward(f"{at}.feed_forward", h),
            )
        return self.norm("encoder_norm", x) if self.config.prenorm else x

    def predict(self, source, ids):
        y = self.embed(ids)
        for i in range(self.config.num_layers):
            at = f"decoder.{i}"
            y = self.sublayer(
                f"{at}.attention_norm",
                y,
                lambda h, at=at: self.self_attention(f"{at}.attention", h, True),
            )
            y = self.sublayer(
                f"{at}.cross_attention_norm",
                y,
                lambda h, at=at: self.cross_attention(f"{at}.cross_attention", h, source),
            )
            y = self.sublayer(
                f"{at}.feed_forward_norm",
                y,
                lambda h, at=at: self.feed_forward(f"{at}.feed_forward", h),
            )
        y = self.norm("decoder_norm", y) if self.config.prenorm else y
        return y @ self.w("embedding.weight").T
