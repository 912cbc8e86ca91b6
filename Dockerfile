FROM python:3.12-slim
WORKDIR /opt/ether-diffusion
COPY pyproject.toml setup.py MANIFEST.in README.md LICENSE CHANGELOG.md CITATION.cff constraints.txt ./
COPY docs/links.py docs/
COPY configs configs
COPY ether_diffusion ether_diffusion
RUN pip install --no-cache-dir --constraint constraints.txt ".[study,heic]"
WORKDIR /data
ENTRYPOINT ["ether"]
