"""Train an ETHER+ adapter on a diffusers UNet through PEFT, save it, and draw with it beside a second one.

    python examples/peft_in_diffusers.py --base stable-diffusion-v1-5/stable-diffusion-v1-5 --images photos/ --steps 400

The training loop is as short as it can be; ``ether train`` has prior preservation, validation and a resumable run.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, DiffusionPipeline
from torch import Tensor

import ether_diffusion.peft_tuner as tuner  # registers the type ETHER with PEFT
from ether_diffusion.images import list_images, load_image

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", required=True, help="a folder or Hub id of SD 1.x or 2.x")
    parser.add_argument("--images", type=Path, required=True, help="a folder of pictures of the subject")
    parser.add_argument("--prompt", default="a photo of qwe dog")
    parser.add_argument("--output", type=Path, default=Path("runs/peft-dog"))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--learning_rate", type=float, default=6e-3, help="the paper's")
    parser.add_argument("--resolution", type=int, default=512)
    return parser.parse_args()


def pictures(folder: Path, size: int) -> Tensor:
    """All pictures of a folder, (n, 3, size, size) in [-1, 1]."""
    opened = [np.asarray(load_image(path).resize((size, size))) for path in list_images(folder)]
    return torch.from_numpy(np.stack(opened)).permute(0, 3, 1, 2).float() / 127.5 - 1


def main() -> None:
    options = arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = DiffusionPipeline.from_pretrained(options.base).to(device)
    unet = pipe.unet.requires_grad_(False).train()

    torch.manual_seed(0)
    unet.add_adapter(tuner.EtherPeftConfig(variant="ether_plus", n_blocks=4, target_modules=ATTENTION), "dog")
    vectors = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    print(f"{sum(vector.numel() for vector in vectors):,} trained numbers")

    with torch.no_grad():
        images = pictures(options.images, options.resolution).to(device)
        latents = pipe.vae.encode(images).latent_dist.sample() * pipe.vae.config.scaling_factor
        prompt, _ = pipe.encode_prompt(options.prompt, device, 1, False)
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    optimizer = torch.optim.AdamW(vectors, lr=options.learning_rate, weight_decay=0.0)
    for step in range(options.steps):
        clean = latents[step % len(latents)].unsqueeze(0)
        noise = torch.randn_like(clean)
        times = torch.randint(scheduler.config.num_train_timesteps, (1,), device=device)
        noisy = scheduler.add_noise(clean, noise, times)
        is_v = scheduler.config.prediction_type == "v_prediction"
        target = scheduler.get_velocity(clean, noise, times) if is_v else noise
        loss = F.mse_loss(unet(noisy, times, encoder_hidden_states=prompt).sample, target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vectors, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.4f}")
    tuner.save(unet, options.output, "dog")

    # a second adapter, here the same one under another name; several add their updates
    unet.eval()
    tuner.load(unet, options.output, "again")
    pipe.set_adapters(["dog", "again"], [0.8, 0.2])
    sizes = {"height": options.resolution, "width": options.resolution}
    pipe(options.prompt, num_inference_steps=25, **sizes).images[0].save(options.output / "sample.png")

    # the same adapter as this library's own file, for `ether.load` and `ether export`
    print(tuner.from_peft({"unet": options.output}, options.output / "ether"))


if __name__ == "__main__":
    main()
