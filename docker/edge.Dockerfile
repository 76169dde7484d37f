# The agent on a device: contract, security and edge packages, one runtime, nothing else.
ARG PYTHON=python:3.11-slim-bookworm
FROM ${PYTHON} AS build
ARG RUNTIME=edge-openvino
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY proto proto
COPY security security
COPY edge edge
COPY cloud/__init__.py cloud/__init__.py
COPY compiler/__init__.py compiler/__init__.py
RUN python -m venv /opt/isthmus \
    && /opt/isthmus/bin/pip install --no-cache-dir -c constraints.txt ".[${RUNTIME}]"

FROM ${PYTHON}
RUN useradd --system --uid 10001 --create-home --home-dir /var/lib/isthmus isthmus
COPY --from=build /opt/isthmus /opt/isthmus
ENV PATH=/opt/isthmus/bin:$PATH PYTHONDONTWRITEBYTECODE=1
USER 10001
VOLUME /var/lib/isthmus
EXPOSE 8001
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["isthmus", "edge", "status", "--address", "127.0.0.1:8001"]
ENTRYPOINT ["isthmus", "edge"]
CMD ["run", "--home", "/var/lib/isthmus", "--listen", "127.0.0.1:8001"]
