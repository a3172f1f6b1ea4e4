BEGIN TRANSACTION;
CREATE TABLE gpupool_schema (
	version INTEGER NOT NULL, 
	PRIMARY KEY (version)
);
INSERT INTO "gpupool_schema" VALUES(1);
CREATE TABLE gpus (
	uuid VARCHAR(80) NOT NULL, 
	server VARCHAR(255) NOT NULL, 
	memory_mib INTEGER NOT NULL, 
	used_mib INTEGER NOT NULL, 
	PRIMARY KEY (uuid), 
	CONSTRAINT never_beyond_memory CHECK (used_mib >= 0 AND used_mib <= memory_mib)
);
INSERT INTO "gpus" VALUES('GPU-c9ec2eca-589a-5a70-91f9-9f4aba5703f7','one',32510,10753);
INSERT INTO "gpus" VALUES('GPU-f3384686-9b58-5191-bf60-b74d56b3de93','one',32510,9753);
CREATE TABLE leases (
	seq INTEGER NOT NULL, 
	id VARCHAR(36) NOT NULL, 
	owner TEXT NOT NULL, 
	namespace VARCHAR(63) NOT NULL, 
	num_gpus INTEGER NOT NULL, 
	partial DOUBLE, 
	memory_mib INTEGER, 
	filters TEXT NOT NULL, 
	wait BOOLEAN NOT NULL, 
	secret_sha256 VARCHAR(64) NOT NULL, 
	label TEXT NOT NULL, 
	client TEXT NOT NULL, 
	state VARCHAR(16) NOT NULL, 
	reason TEXT NOT NULL, 
	created_at DOUBLE NOT NULL, 
	granted_at DOUBLE, 
	ended_at DOUBLE, 
	ttl_s DOUBLE NOT NULL, 
	worker_host TEXT, 
	worker_port INTEGER, 
	worker_pid INTEGER, 
	worker_created DOUBLE, 
	PRIMARY KEY (seq), 
	CONSTRAINT known_state CHECK (state IN ('QUEUED', 'GRANTED', 'ACTIVE', 'PARKED', 'RELEASED', 'EXPIRED', 'LOST', 'CANCELLED')), 
	CONSTRAINT some_gpus CHECK (num_gpus >= 1), 
	CONSTRAINT one_size CHECK ((partial IS NULL) <> (memory_mib IS NULL)), 
	UNIQUE (id)
);
INSERT INTO "leases" VALUES(1,'00000000-0000-0000-0000-000000000001','ada','default',2,0.3,NULL,'{}',1,'abababababababababababababababababababababababababababababababab','','','ACTIVE','',1000000.0,1000000.0,NULL,15.0,'127.0.0.1',4711,12345,999.5);
INSERT INTO "leases" VALUES(2,'00000000-0000-0000-0000-000000000002','ada','default',1,NULL,1000,'{}',1,'abababababababababababababababababababababababababababababababab','läbel','','GRANTED','',1000000.0,1000000.0,NULL,15.0,NULL,NULL,NULL,NULL);
INSERT INTO "leases" VALUES(3,'00000000-0000-0000-0000-000000000003','ada','default',1,1.0,NULL,'{"index": "0"}',1,'abababababababababababababababababababababababababababababababab','','','QUEUED','',1000000.0,NULL,NULL,15.0,NULL,NULL,NULL,NULL);
INSERT INTO "leases" VALUES(4,'00000000-0000-0000-0000-000000000004','ada','default',1,0.1,NULL,'{}',1,'abababababababababababababababababababababababababababababababab','','','CANCELLED','released',1000000.0,NULL,1000000.0,15.0,NULL,NULL,NULL,NULL);
CREATE TABLE samples (
	step_s INTEGER NOT NULL, 
	at INTEGER NOT NULL, 
	memory_mib BIGINT NOT NULL, 
	granted_mib BIGINT NOT NULL, 
	used_mib BIGINT NOT NULL, 
	busy DOUBLE NOT NULL, 
	gpus BLOB NOT NULL, 
	PRIMARY KEY (step_s, at)
);
CREATE TABLE slices (
	lease INTEGER NOT NULL, 
	gpu_uuid VARCHAR(80) NOT NULL, 
	server VARCHAR(255) NOT NULL, 
	gpu_index INTEGER NOT NULL, 
	gpu_name TEXT NOT NULL, 
	memory_mib INTEGER NOT NULL, 
	total_mib INTEGER NOT NULL, 
	emulated BOOLEAN NOT NULL, 
	PRIMARY KEY (lease, gpu_uuid), 
	CONSTRAINT within_its_gpu CHECK (memory_mib >= 1 AND memory_mib <= total_mib), 
	FOREIGN KEY(lease) REFERENCES leases (seq) ON DELETE CASCADE, 
	FOREIGN KEY(gpu_uuid) REFERENCES gpus (uuid)
);
INSERT INTO "slices" VALUES(1,'GPU-c9ec2eca-589a-5a70-91f9-9f4aba5703f7','one',0,'Tesla V100-PCIE-32GB (emulated)',9753,32510,1);
INSERT INTO "slices" VALUES(1,'GPU-f3384686-9b58-5191-bf60-b74d56b3de93','one',1,'Tesla V100-PCIE-32GB (emulated)',9753,32510,1);
INSERT INTO "slices" VALUES(2,'GPU-c9ec2eca-589a-5a70-91f9-9f4aba5703f7','one',0,'Tesla V100-PCIE-32GB (emulated)',1000,32510,1);
CREATE TABLE tokens (
	id VARCHAR(32) NOT NULL, 
	sha256 VARCHAR(64) NOT NULL, 
	description TEXT NOT NULL, 
	owner TEXT NOT NULL, 
	namespace VARCHAR(63) NOT NULL, 
	administers BOOLEAN NOT NULL, 
	created_at DOUBLE NOT NULL, 
	expires_at DOUBLE, 
	revoked_at DOUBLE, 
	cuts_leases BOOLEAN NOT NULL, 
	last_used_at DOUBLE, 
	PRIMARY KEY (id)
);
INSERT INTO "tokens" VALUES('620893ff592b','08b02c51c218c7ff8fa407e96cb442f292d43185caefe7d11bb838fc177d24a9','administrator','administrator','default',1,1.0,NULL,NULL,0,NULL);
CREATE INDEX leases_by_end ON leases (ended_at);
CREATE INDEX leases_by_state ON leases (state);
COMMIT;
