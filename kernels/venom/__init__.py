from kernels.venom.reference import Venom, token_mask, venom_mask
