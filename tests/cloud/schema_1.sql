BEGIN TRANSACTION;
CREATE TABLE assertions (
	device_id VARCHAR NOT NULL, 
	jti VARCHAR NOT NULL, 
	expires_at DOUBLE NOT NULL, 
	PRIMARY KEY (device_id, jti), 
	FOREIGN KEY(device_id) REFERENCES devices (id)
);
INSERT INTO "assertions" VALUES('camera-1','j',9000000000.0);
CREATE TABLE devices (
	id VARCHAR NOT NULL, 
	public_key_pem BLOB NOT NULL, 
	enrolled_at DOUBLE NOT NULL, 
	last_seen_at DOUBLE NOT NULL, 
	PRIMARY KEY (id)
);
INSERT INTO "devices" VALUES('camera-1',X'6B65792031',1.0,2.0);
INSERT INTO "devices" VALUES('camera-2',X'6B65792032',1.0,2.0);
CREATE TABLE invites (
	code_sha256 VARCHAR NOT NULL, 
	device_id VARCHAR NOT NULL, 
	expires_at DOUBLE NOT NULL, 
	used_at DOUBLE, 
	PRIMARY KEY (code_sha256)
);
INSERT INTO "invites" VALUES('abababababababababababababababababababababababababababababababab','camera-3',9000000000.0,NULL);
CREATE TABLE models (
	name VARCHAR NOT NULL, 
	released BIGINT, 
	PRIMARY KEY (name)
);
INSERT INTO "models" VALUES('triage',2);
CREATE TABLE reports (
	device_id VARCHAR NOT NULL, 
	model VARCHAR NOT NULL, 
	version BIGINT NOT NULL, 
	state INTEGER NOT NULL, 
	serving_version BIGINT NOT NULL, 
	reason VARCHAR NOT NULL, 
	detail VARCHAR NOT NULL, 
	bytes_fetched BIGINT NOT NULL, 
	variant VARCHAR NOT NULL, 
	reported_at DOUBLE NOT NULL, 
	PRIMARY KEY (device_id, model), 
	FOREIGN KEY(device_id) REFERENCES devices (id)
);
INSERT INTO "reports" VALUES('camera-1','triage',2,2,1,'digest-mismatch','d',7,'onnxruntime-fp32',1500.0);
CREATE TABLE schema (
	id INTEGER NOT NULL, 
	version INTEGER NOT NULL, 
	PRIMARY KEY (id)
);
INSERT INTO "schema" VALUES(1,1);
CREATE TABLE versions (
	model VARCHAR NOT NULL, 
	version BIGINT NOT NULL, 
	manifest_sha256 VARCHAR NOT NULL, 
	heavy_digest VARCHAR NOT NULL, 
	heavy_version BIGINT NOT NULL, 
	published_at DOUBLE NOT NULL, 
	PRIMARY KEY (model, version), 
	FOREIGN KEY(model) REFERENCES models (name)
);
INSERT INTO "versions" VALUES('triage',1,'1111111111111111111111111111111111111111111111111111111111111111','0000000000000000000000000000000000000000000000000000000000000000',1,1001.0);
INSERT INTO "versions" VALUES('triage',2,'2222222222222222222222222222222222222222222222222222222222222222','0000000000000000000000000000000000000000000000000000000000000000',1,1002.0);
COMMIT;
