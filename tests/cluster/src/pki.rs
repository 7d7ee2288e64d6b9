//! Keys and certificates of one cluster, minted by an authority of its own. It knows who is called what; it must not
//! know where servers listen, which its callers say.

use std::fs;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};

/// The group that RBAC lets do everything.
pub(crate) const MASTERS: &str = "system:masters";

/// A directory with `ca.crt`, `ca.key`, the keys of service accounts, and a pair of files for each name issued.
pub(crate) struct Pki {
    dir: PathBuf,
    issuer: Issuer<'static, KeyPair>,
}

/// A certificate and its key.
#[derive(Debug, Clone)]
pub(crate) struct Pair {
    pub(crate) certificate: PathBuf,
    pub(crate) key: PathBuf,
}

impl std::fmt::Debug for Pki {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pki")
            .field("dir", &self.dir)
            .finish_non_exhaustive()
    }
}

impl Pki {
    /// Makes an authority, and the key that signs service accounts' tokens.
    pub(crate) fn create(dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
        let key = KeyPair::generate().context("making a key")?;
        let params = authority();
        let certificate = params.self_signed(&key).context("signing the authority")?;
        let this = Self {
            dir: dir.to_path_buf(),
            issuer: Issuer::new(params, key),
        };
        write(&this.ca(), &certificate.pem())?;
        write(&this.dir.join("ca.key"), &this.issuer.key().serialize_pem())?;
        let accounts = KeyPair::generate().context("making a key")?;
        write(&this.service_accounts().key, &accounts.serialize_pem())?;
        write(
            &this.service_accounts().certificate,
            &accounts.public_key_pem(),
        )?;
        Ok(this)
    }

    /// Opens what was made before, to issue more.
    pub(crate) fn open(dir: &Path) -> Result<Self> {
        let file = dir.join("ca.key");
        let pem =
            fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
        let key = KeyPair::from_pem(&pem).with_context(|| format!("parsing {}", file.display()))?;
        Ok(Self {
            dir: dir.to_path_buf(),
            issuer: Issuer::new(authority(), key),
        })
    }

    /// The authority's certificate.
    pub(crate) fn ca(&self) -> PathBuf {
        self.dir.join("ca.crt")
    }

    /// The key pair of service accounts; its public half is no certificate.
    pub(crate) fn service_accounts(&self) -> Pair {
        Pair {
            certificate: self.dir.join("service-accounts.pub"),
            key: self.dir.join("service-accounts.key"),
        }
    }

    /// Issues a certificate for a server and client called `name` in `group`, reached by these names and addresses.
    pub(crate) fn issue(
        &self,
        file: &str,
        name: &str,
        group: &str,
        sans: &[String],
    ) -> Result<Pair> {
        let key = KeyPair::generate().context("making a key")?;
        let mut params = CertificateParams::new(sans).context("naming a server")?;
        params.distinguished_name.push(DnType::CommonName, name);
        if !group.is_empty() {
            params
                .distinguished_name
                .push(DnType::OrganizationName, group);
        }
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        let certificate = params
            .signed_by(&key, &self.issuer)
            .with_context(|| format!("signing {name}"))?;
        let pair = Pair {
            certificate: self.dir.join(format!("{file}.crt")),
            key: self.dir.join(format!("{file}.key")),
        };
        write(&pair.certificate, &certificate.pem())?;
        write(&pair.key, &key.serialize_pem())?;
        Ok(pair)
    }
}

fn authority() -> CertificateParams {
    let mut params = CertificateParams::default();
    params
        .distinguished_name
        .push(DnType::CommonName, "culvert-cluster");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![
        KeyUsagePurpose::KeyCertSign,
        KeyUsagePurpose::DigitalSignature,
    ];
    params
}

fn write(path: &Path, pem: &str) -> Result<()> {
    use std::io::Write as _;
    fs::File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .and_then(|mut file| file.write_all(pem.as_bytes()))
        .with_context(|| format!("writing {}", path.display()))
}
