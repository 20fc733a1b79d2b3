"""Networks with random values, by which a misplaced layer shows."""

from torch import nn


def randomise(network: nn.Module) -> nn.Module:
    """Fresh values that keep signals near 1; norms, frozen ones too, are not the identity."""
    for module in network.modules():
        has_statistics = getattr(module, "running_var", None) is not None
        if has_statistics or isinstance(module, nn.GroupNorm):
            nn.init.uniform_(module.weight, 0.3, 0.7)
            nn.init.normal_(module.bias, std=0.2)
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            bound = (3 / module.weight[0].numel()) ** 0.5
            nn.init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.2)
        if has_statistics:
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            if getattr(module, "num_batches_tracked", None) is not None:
                module.num_batches_tracked.zero_()
    return network.eval()
