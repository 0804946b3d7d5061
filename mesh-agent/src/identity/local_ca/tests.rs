//! The files of the CA, what opens them, and what the issued certificates say.

use std::{fs, os::unix::fs::PermissionsExt as _};

use x509_parser::{extensions::GeneralName, parse_x509_certificate, prelude::ASN1Time};

use super::*;
use crate::identity::tests::{DAY, Scratch, ca, id, init};

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[test]
fn files_have_their_modes_and_forms() {
    let scratch = Scratch::new();
    let dir = scratch.path().join("new/ca");
    let created = init_in(&dir);
    assert_eq!((mode(&created.bundle), mode(&created.token), mode(&dir)), (0o644, 0o600, 0o700));
    let token = fs::read_to_string(&created.token).unwrap();
    assert!(token.starts_with("ecs-mesh-join-1.") && token.ends_with('\n'));
    assert_eq!(token.trim().len(), TOKEN_PREFIX.len() + 43);
    let bundle = fs::read_to_string(&created.bundle).unwrap();
    assert!(bundle.starts_with("-----BEGIN CERTIFICATE-----\n"));
    assert!(bundle.contains("-----BEGIN ECS MESH SEALED CA KEY-----\n"));
    assert!(!bundle.contains("PRIVATE KEY"));
}

fn init_in(dir: &Path) -> Created {
    super::init(&"demo.mesh".parse().unwrap(), dir, SystemTime::now()).unwrap()
}

#[test]
fn existing_files_are_never_overwritten() {
    for existing in [BUNDLE_FILE, TOKEN_FILE] {
        let scratch = Scratch::new();
        fs::write(scratch.path().join(existing), "precious").unwrap();
        let error = super::init(&"demo.mesh".parse().unwrap(), scratch.path(), SystemTime::now()).unwrap_err();
        assert!(matches!(&error, CaError::Exists(path) if path.ends_with(existing)), "{error:?}");
        assert_eq!(fs::read_to_string(scratch.path().join(existing)).unwrap(), "precious");
        assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 1, "nothing else was written");
    }
}

#[test]
fn another_token_does_not_open_the_bundle() {
    let (ours_dir, theirs_dir) = (Scratch::new(), Scratch::new());
    let (ours, theirs) = (init(&ours_dir, "demo.mesh"), init(&theirs_dir, "demo.mesh"));
    let error = LocalCa::open(&ours.bundle, &theirs.token).err().unwrap();
    assert!(matches!(error, CaError::WrongToken { .. }), "{error:?}");
    assert!(error.to_string().contains("mesh-agent ca init"), "names the remedy: {error}");
}

#[test]
fn any_change_of_the_sealed_key_or_its_certificate_is_noticed() {
    let (ours_dir, theirs_dir) = (Scratch::new(), Scratch::new());
    let (ours, theirs) = (init(&ours_dir, "demo.mesh"), init(&theirs_dir, "demo.mesh"));
    let blocks = |path| pem::parse_many(fs::read(path).unwrap()).unwrap();
    let (mine, other) = (blocks(&ours.bundle), blocks(&theirs.bundle));

    // Our sealed key below another root.
    fs::write(&ours.bundle, pem::encode_many(&[other[0].clone(), mine[1].clone()])).unwrap();
    assert!(matches!(LocalCa::open(&ours.bundle, &ours.token), Err(CaError::WrongToken { .. })));

    for at in [0, 1, 20, mine[1].contents().len() - 1] {
        let mut sealed = mine[1].contents().to_vec();
        sealed[at] ^= 1;
        fs::write(&ours.bundle, pem::encode_many(&[mine[0].clone(), pem::Pem::new(SEALED_TAG, sealed)])).unwrap();
        assert!(matches!(LocalCa::open(&ours.bundle, &ours.token), Err(CaError::WrongToken { .. })), "octet {at}");
    }
    fs::write(&ours.bundle, pem::encode_many(&mine)).unwrap();
    assert!(LocalCa::open(&ours.bundle, &ours.token).is_ok());
}

#[test]
fn malformed_files_say_what_is_wrong() {
    let scratch = Scratch::new();
    let created = init(&scratch, "demo.mesh");
    for token in ["", "ecs-mesh-join-1.", "ecs-mesh-join-1.AAAA", "ecs-mesh-join-2.AAAA", "\u{0}"] {
        fs::write(&created.token, token).unwrap();
        assert!(matches!(LocalCa::open(&created.bundle, &created.token), Err(CaError::MalformedToken(_))), "{token:?}");
    }
    let scratch = Scratch::new();
    let created = init(&scratch, "demo.mesh");
    let blocks = pem::parse_many(fs::read(&created.bundle).unwrap()).unwrap();
    let key_first = KeyPair::generate().unwrap().serialize_pem();
    for bundle in [
        String::new(),
        "garbage".to_owned(),
        pem::encode(&blocks[0]),
        pem::encode(&blocks[1]),
        pem::encode_many(&[pem::Pem::new(CERTIFICATE_TAG, b"no".as_slice()), blocks[1].clone()]),
        key_first,
    ] {
        fs::write(&created.bundle, &bundle).unwrap();
        let error = LocalCa::open(&created.bundle, &created.token).err().unwrap();
        assert!(matches!(error, CaError::MalformedBundle { .. }), "{bundle:?}: {error:?}");
    }
}

#[test]
fn further_roots_are_trusted_but_do_not_issue() {
    let (ours_dir, theirs_dir) = (Scratch::new(), Scratch::new());
    let (ours, theirs) = (init(&ours_dir, "demo.mesh"), init(&theirs_dir, "demo.mesh"));
    let other = pem::parse_many(fs::read(&theirs.bundle).unwrap()).unwrap().remove(0);
    let more = format!("{}{}", fs::read_to_string(&ours.bundle).unwrap(), pem::encode(&other));
    fs::write(&ours.bundle, more).unwrap();
    let ca = LocalCa::open(&ours.bundle, &ours.token).unwrap();
    assert_eq!(ca.trust_bundle().roots.len(), 2);
    let leaf = ca.issue(&id("web"), SystemTime::now(), DAY).unwrap();
    let signer = |root: &[u8]| {
        let (_, root) = parse_x509_certificate(root).unwrap();
        let (_, leaf) = parse_x509_certificate(&leaf.certificate).unwrap();
        leaf.verify_signature(Some(root.public_key())).is_ok()
    };
    let roots: Vec<_> = ca.trust_bundle().roots.iter().map(|root| signer(root)).collect();
    assert_eq!(roots, [true, false]);
}

#[test]
fn the_root_is_a_ca_of_its_trust_domain() {
    let ca = ca("demo.mesh");
    let bundle = ca.trust_bundle();
    let (_, root) = parse_x509_certificate(&bundle.roots[0]).unwrap();
    let usage = root.key_usage().unwrap().unwrap().value;
    assert!(root.is_ca() && usage.key_cert_sign() && !usage.digital_signature());
    let names = &root.subject_alternative_name().unwrap().unwrap().value.general_names;
    assert!(matches!(names.as_slice(), [GeneralName::URI("spiffe://demo.mesh")]), "{names:?}");
    assert_eq!(root.basic_constraints().unwrap().unwrap().value.path_len_constraint, Some(0));
    let years = (root.validity().not_after.timestamp() - root.validity().not_before.timestamp()) / (365 * 24 * 3600);
    assert_eq!(years, 10);
    assert_eq!(ca.domain().as_str(), "demo.mesh");
}

#[test]
fn a_leaf_follows_the_rules_of_x509_svid() {
    let ca = ca("demo.mesh");
    let now = SystemTime::now();
    let leaf = ca.issue(&id("web"), now, Duration::from_secs(3600)).unwrap();
    let (rest, certificate) = parse_x509_certificate(&leaf.certificate).unwrap();
    assert!(rest.is_empty());
    let names = &certificate.subject_alternative_name().unwrap().unwrap().value.general_names;
    assert!(matches!(names.as_slice(), [GeneralName::URI(uri)] if *uri == id("web").as_str()), "{names:?}");
    assert!(!certificate.basic_constraints().unwrap().unwrap().value.ca);
    let usage = certificate.key_usage().unwrap().unwrap().value;
    assert!(usage.digital_signature() && !usage.key_cert_sign() && !usage.crl_sign());
    let extended = certificate.extended_key_usage().unwrap().unwrap().value;
    assert!(extended.server_auth && extended.client_auth && !extended.any);
    let seconds = |at: SystemTime| i64::try_from(at.duration_since(UNIX_EPOCH).unwrap().as_secs()).unwrap();
    assert_eq!(certificate.validity().not_before.timestamp(), seconds(now - BACKDATE));
    assert_eq!(certificate.validity().not_after.timestamp(), seconds(now + Duration::from_secs(3600)));
    assert!(certificate.validity().is_valid_at(ASN1Time::from_timestamp(seconds(now)).unwrap()));
    assert_eq!(leaf.not_after, UNIX_EPOCH + Duration::from_secs(certificate.validity().not_after.timestamp() as u64));
    assert_eq!(certificate.raw_serial_as_string().replace(':', ""), leaf.serial);
    assert_eq!(leaf.serial.len(), 32);
    let bundle = ca.trust_bundle();
    let (_, root) = parse_x509_certificate(&bundle.roots[0]).unwrap();
    certificate.verify_signature(Some(root.public_key())).unwrap();
    assert_eq!(svid::leaf_facts(&leaf.certificate).unwrap().id, id("web"));
}

#[test]
fn a_leaf_never_outlives_its_root() {
    let ca = ca("demo.mesh");
    let leaf = ca.issue(&id("web"), SystemTime::now(), ROOT_TTL * 2).unwrap();
    assert!(leaf.not_after <= ca.not_after);
}

#[test]
fn certificates_that_are_no_workloads_are_told_apart() {
    use svid::NotSvid;
    let root = ca("demo.mesh").trust_bundle().roots[0].clone();
    assert_eq!(svid::leaf_facts(&root), Err(NotSvid::MaySign));
    assert_eq!(svid::leaf_facts(b"no"), Err(NotSvid::Malformed));
    assert_eq!(svid::root_facts(b"no"), None);

    let key = KeyPair::generate().unwrap();
    let with = |names: &[&str]| {
        let mut params = CertificateParams::default();
        params.subject_alt_names = names.iter().map(|name| SanType::URI((*name).try_into().unwrap())).collect();
        svid::leaf_facts(params.self_signed(&key).unwrap().der())
    };
    assert_eq!(with(&[]), Err(NotSvid::UriNames));
    assert_eq!(with(&["spiffe://demo.mesh/a", "spiffe://demo.mesh/b"]), Err(NotSvid::UriNames));
    assert_eq!(with(&["https://demo.mesh/a"]), Err(NotSvid::NotSpiffe));
    assert_eq!(with(&["spiffe://demo.mesh"]), Err(NotSvid::NotSpiffe));
    assert_eq!(with(&["spiffe://demo.mesh/a"]).unwrap().id.as_str(), "spiffe://demo.mesh/a");
}
