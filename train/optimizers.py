"""Muon for the matrices of a model and AdamW for the rest, as one optimizer that the Trainer can save and continue."""

import torch
from torch import nn

NOT_FOR_MUON = ("embed_tokens", "lm_head", "b_proj")
"""Matrices whose rows are no neurons of a hidden layer: tables of tokens, and one number a head."""


class MuonAndAdamW(torch.optim.Optimizer):
    """`torch.optim.Muon` and `torch.optim.AdamW` over one list of groups and one state.

    Muon's updates are scaled to the size of AdamW's, so that one learning rate and one weight decay serve both.
    """

    def __init__(self, matrices: list[dict], others: list[dict], lr: float, weight_decay: float, betas, eps: float):
        shared = {"lr": lr, "weight_decay": weight_decay}
        self.muon = torch.optim.Muon(matrices, **shared, adjust_lr_fn="match_rms_adamw")
        self.adamw = torch.optim.AdamW(others, **shared, betas=betas, eps=eps)
        super().__init__([*self.muon.param_groups, *self.adamw.param_groups], {})
        self._share()

    def _share(self) -> None:
        count = len(self.muon.param_groups)
        self.muon.param_groups, self.adamw.param_groups = self.param_groups[:count], self.param_groups[count:]
        self.muon.state = self.adamw.state = self.state

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure=None):
        loss = self.muon.step(closure)
        self.adamw.step()
        return loss


class MuonFactory:
    """Makes the optimizer of a model; in this form the Trainer asks for it once the model is where it will be trained."""

    def __call__(self, model: nn.Module, lr: float, weight_decay: float, betas, eps: float) -> MuonAndAdamW:
        matrices, decayed, others = [], [], []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                is_matrix = parameter.ndim == 2 and not any(part in NOT_FOR_MUON for part in name.split("."))
                (matrices if is_matrix else decayed if parameter.ndim > 1 else others).append(parameter)
        rest = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
        rest = [group for group in rest if group["params"]]
        return MuonAndAdamW([{"params": matrices}], rest, lr, weight_decay, betas, eps)
