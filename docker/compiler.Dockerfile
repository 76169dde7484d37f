# The compiler stage: models in, bundle out. Runs as a job, serves nothing.
ARG PYTHON=python:3.11-slim-bookworm
FROM ${PYTHON} AS build
# Add torch and mlflow for sources that need them.
ARG EXTRAS=compiler,tvm,tensorrt-rtx
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY proto proto
COPY security security
COPY compiler compiler
COPY edge/__init__.py edge/__init__.py
COPY cloud/__init__.py cloud/__init__.py
RUN python -m venv /opt/isthmus \
    && /opt/isthmus/bin/pip install --no-cache-dir -c constraints.txt ".[${EXTRAS}]"

FROM ${PYTHON}
# TVM links the libraries that it makes with a C++ compiler.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --system --uid 10001 --create-home --home-dir /work isthmus
COPY --from=build /opt/isthmus /opt/isthmus
ENV PATH=/opt/isthmus/bin:$PATH PYTHONDONTWRITEBYTECODE=1
USER 10001
WORKDIR /work
HEALTHCHECK NONE
ENTRYPOINT ["isthmus"]
CMD ["compile", "--help"]
