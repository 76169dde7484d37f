# The compiler stage: models in, bundle out. Runs as a job, serves nothing.
ARG PYTHON=python:3.11-slim-bookworm
FROM ${PYTHON} AS build
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY proto proto
COPY security security
COPY compiler compiler
COPY edge/__init__.py edge/__init__.py
COPY cloud/__init__.py cloud/__init__.py
RUN python -m venv /opt/isthmus \
    && /opt/isthmus/bin/pip install --no-cache-dir -c constraints.txt ".[compiler]"

FROM ${PYTHON}
RUN useradd --system --uid 10001 --create-home --home-dir /work isthmus
COPY --from=build /opt/isthmus /opt/isthmus
ENV PATH=/opt/isthmus/bin:$PATH PYTHONDONTWRITEBYTECODE=1
USER 10001
WORKDIR /work
HEALTHCHECK NONE
ENTRYPOINT ["isthmus", "compile"]
CMD ["--help"]
